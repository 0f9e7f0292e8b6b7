"""Resizes, extractors, image sets and the cache of features, against clean-fid and open_clip."""

import hashlib
import importlib.util
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import micro
from diffusion.mollifier import IDENTITY, Mollifier
from infty_diff.model import InftyDiff
from metrics import weights
from metrics.evaluation import evaluate, table
from metrics.extractors import Extractor, RandomFeatures, encoder_extractor, open_extractor
from metrics.features import Extraction, cached_features, features
from metrics.frechet import frechet_distance, gaussian_of
from metrics.images import DatasetImages, Mirrored, MollifiedSamples
from metrics.resize import clean_resize, clip_resize
from pictures import folder, images_of, noise, zipped
from runtime.claimed import claim_folder, save_png

CPU = torch.device("cpu")
SIZES = [(224, 224), (299, 299), (16, 12), (301, 223), (128, 257)]


@pytest.fixture
def how(tmp_path) -> Extraction:
    return Extraction(batch_size=4, threads=3, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("size", SIZES)
def test_clean_resize_is_clean_fid_s(size):
    resize = pytest.importorskip("cleanfid.resize")
    image = noise(size, 1)
    np.testing.assert_array_equal(clean_resize(image, (299, 299)), resize.build_resizer("clean")(image))
    wide = resize.make_resizer("PIL", False, "bicubic", (40, 30))(image)
    np.testing.assert_array_equal(clean_resize(image, (30, 40)), wide)
    np.testing.assert_array_equal(clean_resize(image, size), image)


def clean_fid_clip(monkeypatch, model=None) -> types.ModuleType:
    """clean-fid's CLIP features with `model` in place of the package that would download OpenAI's."""
    pytest.importorskip("cleanfid")
    clip = types.ModuleType("clip")
    clip.load = lambda name, device: (model, None)
    monkeypatch.setitem(sys.modules, "clip", clip)
    monkeypatch.delitem(sys.modules, "cleanfid.clip_features", raising=False)
    return importlib.import_module("cleanfid.clip_features")


@pytest.mark.parametrize("size", SIZES)
def test_clip_resize_is_clean_fid_s(monkeypatch, size):
    image = noise(size, 2)
    np.testing.assert_array_equal(clip_resize(image), clean_fid_clip(monkeypatch).img_preprocess_clip(image))


def test_clip_features_are_open_clip_s_and_clean_fid_s(monkeypatch, tmp_path, how):
    """The whole path with random weights, stored as OpenAI stores its: half precision, text tower included."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32-quickgelu", pretrained=None)
    model.half().float().eval()
    state = {name: value.half() for name, value in model.state_dict().items() if not name.startswith("transformer")}
    torch.save(state, tmp_path / "ViT-B-32.pt")
    extractor = open_extractor("clip_vit_b_32", CPU, weights=str(tmp_path / "ViT-B-32.pt"))
    samples = images_of(folder(tmp_path / "a", 3, (250, 230)))
    found = features(samples, extractor, how)
    assert found.shape == (3, 512)
    with torch.no_grad():
        expected = model.encode_image(torch.stack([preprocess(Image.fromarray(samples[i])) for i in range(3)]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    theirs = clean_fid_clip(monkeypatch, model)
    from cleanfid import fid

    network = theirs.CLIP_fx("ViT-B/32", device="cpu")
    expected = fid.get_folder_features(str(tmp_path / "a"), network, num_workers=0, device=CPU, verbose=False,
                                       custom_fn_resize=theirs.img_preprocess_clip)  # fmt: skip
    names = [samples.item_name(i) for i in range(3)]
    assert names == sorted(names)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-5, atol=1e-5)

    state.pop("visual.proj")
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"lacks or differs in visual\.proj; accepted: CLIP"):
        open_extractor("clip_vit_b_32", CPU, weights=str(tmp_path / "part.pt"))


class ToyInception(nn.Module):
    """Shaped like the published script: `layers` takes a prepared batch and returns 2048 features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AvgPool2d(13, 11), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(2500, 2048))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_inception_features_are_clean_fid_s(tmp_path, how, monkeypatch):
    theirs = pytest.importorskip("cleanfid.inception_torchscript")
    from cleanfid import fid

    torch.manual_seed(0)
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(ToyInception()).save(str(path))
    monkeypatch.setattr(weights, "SCRIPTS", {hashlib.sha256(path.read_bytes()).hexdigest(): path.name})
    samples = images_of(folder(tmp_path / "a", 3, (40, 330)))
    extractor = open_extractor("inception_v3", CPU, weights=str(path))
    expected = fid.get_folder_features(str(tmp_path / "a"), theirs.InceptionV3W(str(tmp_path), download=False),
                                       num_workers=0, device=CPU, mode="clean", verbose=False)  # fmt: skip
    torch.testing.assert_close(features(samples, extractor, how), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


def small_extractor() -> Extractor:
    """Eight features from a 299x299 input, quick enough for whole evaluations."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.AvgPool2d(50), nn.Flatten(), nn.Linear(75, 8)).eval()
    return Extractor("toy", "FID", "clean", (299, 299), 3, "toy", lambda x: clean_resize(x, (299, 299)),
                     lambda x: net(x / 255))  # fmt: skip


def test_whole_evaluation_is_clean_fid_s(tmp_path, how):
    fid = pytest.importorskip("cleanfid.fid")
    first, second = folder(tmp_path / "a", 30), folder(tmp_path / "b", 25, first_seed=100)
    extractor = small_extractor()
    report = evaluate(images_of(first), images_of(second), extractor, how)
    expected = fid.compute_fid(str(first), str(second), mode="clean", num_workers=0, device=CPU, verbose=False,
                               custom_feat_extractor=extractor.network)  # fmt: skip
    assert report["fid"] == pytest.approx(expected, rel=1e-4)
    assert (report["num_samples"], report["num_reference"], report["feature_dimension"]) == (30, 25, 8)
    assert report["precision_recall_images"] == 25
    assert "FID" in table(report) and not report["warnings"]


def test_folder_and_zip_have_the_same_features(tmp_path, how):
    stored = folder(tmp_path / "a", 6)
    extractor = open_extractor("random_features", CPU)
    from_folder = features(images_of(stored), extractor, how)
    from_zip = features(images_of(zipped(stored, tmp_path / "a.zip")), extractor, how)
    torch.testing.assert_close(from_folder, from_zip, rtol=0, atol=0)
    one_by_one = features(images_of(stored), extractor, Extraction(batch_size=1, threads=1))
    torch.testing.assert_close(from_folder, one_by_one)


def test_the_cache_is_used_while_images_and_extractor_stay(tmp_path, how, monkeypatch):
    stored = folder(tmp_path / "a", 4)
    extractor = open_extractor("random_features", CPU)
    first = cached_features(images_of(stored), extractor, how)

    def fail(*_, **__):
        raise AssertionError("features were computed again")

    with monkeypatch.context() as patch:
        patch.setattr("metrics.features.features", fail)
        torch.testing.assert_close(cached_features(images_of(stored), extractor, how), first, rtol=0, atol=0)
        with pytest.raises(AssertionError):
            cached_features(images_of(stored), extractor, how, patches=1)
        with pytest.raises(AssertionError):
            cached_features(Mirrored(images_of(stored)), extractor, how)
        with pytest.raises(AssertionError):
            cached_features(images_of(stored), small_extractor(), how)
        Image.fromarray(noise((20, 24), 77)).save(stored / "part0" / "0000.png")
        with pytest.raises(AssertionError):
            cached_features(images_of(stored), extractor, how)
    changed = cached_features(images_of(stored), extractor, how)
    assert not torch.equal(changed[0], first[0]) and torch.equal(changed[1:], first[1:])


def test_patches_are_unscaled_cuts(tmp_path, how):
    stored = images_of(folder(tmp_path / "a", 2, (9, 11)))
    seen = []
    extractor = Extractor("cut", "FID", "none", (4, 5), 3, "", lambda x: x.astype(np.float32),
                          lambda x: seen.append(x) or x.flatten(1))  # fmt: skip
    assert features(stored, extractor, how, patches=3).shape == (6, 60)
    for i, patch in enumerate(torch.cat(seen).permute(0, 2, 3, 1).numpy()):
        image = stored[i // 3]
        cuts = [image[top : top + 4, left : left + 5] for top in range(6) for left in range(7)]
        assert any(np.array_equal(patch, cut) for cut in cuts)
    large = Extractor("large", "FID", "none", (10, 4), 3, "", lambda x: x, lambda x: x)
    with pytest.raises(ValueError, match="is 9x11; accepted: images of at least 10x4"):
        evaluate(stored, stored, large, how, patches=1)


def test_patch_fid_is_the_distance_of_the_cuts(tmp_path, how):
    first, second = (images_of(folder(tmp_path / name, 6, (70, 66), seed)) for name, seed in (("a", 0), ("b", 9)))
    extractor = open_extractor("random_features", CPU)
    report = evaluate(first, second, extractor, how, patches=2)
    made, real = (gaussian_of(features(images, extractor, how, patches=2)) for images in (first, second))
    assert report["patch_fid"] == pytest.approx(frechet_distance(real, made))
    assert evaluate(first, first, extractor, how, patches=2)["patch_fid"] == pytest.approx(0, abs=1e-8)
    assert "same of patches, 2 an image" in table(report)


def test_random_features_are_the_same_everywhere():
    sums = [float(buffer.double().sum()) for buffer in RandomFeatures().buffers()]
    assert sums == pytest.approx([-5.8653, -4.9202, 3.6397], abs=1e-3)


def test_encoder_features_are_the_run_s_latents(tmp_path, how):
    model = InftyDiff.from_runs(micro.write_run(micro.image(tmp_path)), device="cpu")
    samples = images_of(folder(tmp_path / "a", 3, (16, 12)))
    extractor = encoder_extractor(model.encode, (16, 12), 3, "weights")
    pixels = torch.stack([torch.from_numpy(samples[i]).permute(2, 0, 1) for i in range(3)])
    torch.testing.assert_close(features(samples, extractor, how), model.encode(pixels / 127.5 - 1))


def test_sets_of_images(tmp_path):
    stored = folder(tmp_path / "a", 4)
    (stored / "notes.txt").write_text("no image")
    Image.fromarray(noise((5, 5), 1)).save(stored / "contact_sheet.png")
    images = images_of(stored)
    assert len(images) == 4 and images[0].shape == (20, 24, 3) and images.item_name(1) == "part0/0002.png"
    assert len(images_of(stored, limit=2)) == 2
    with pytest.raises(ValueError, match="num_samples is 5; accepted: at most 4"):
        images_of(stored, limit=5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="--samples: no images in"):
        images_of(tmp_path / "empty")
    turned = Mirrored(images)
    np.testing.assert_array_equal(turned[1], images[1][:, ::-1])
    half = Mirrored(images, seed=0)
    mirrored = [np.array_equal(half[i], turned[i]) for i in range(4)]
    assert 0 < sum(mirrored) < 4 and [np.array_equal(half[i], images[i]) for i in range(4)] == [not m for m in mirrored]
    assert len({images.fingerprint(), turned.fingerprint(), half.fingerprint()}) == 3


def test_of_a_folder_of_samples_only_the_samples_count(tmp_path, caplog):
    for name in ("000000.png", "000001.png", "000002.png", "contact_sheet.png", "overview.png"):
        Image.fromarray(noise((6, 7), 1)).save(tmp_path / name)
    assert len(images_of(tmp_path)) == 4
    (tmp_path / "manifest.json").write_text("{}")  # another program's
    assert len(images_of(tmp_path)) == 4
    mark = claim_folder(tmp_path / "drawn", "manifest.json", {"settings": {}, "model": {}})
    shutil.copy(tmp_path / "drawn" / "manifest.json", tmp_path)
    with pytest.raises(ValueError, match=r"--samples: .* none that its manifest\.json tells of; accepted"):
        images_of(tmp_path)
    for name, seed in (("000001", "1"), ("000002", "1"), ("1234567", "1234567")):
        save_png(tmp_path / f"{name}.png", torch.zeros(3, 6, 7, dtype=torch.uint8), mark, {"seed": seed})
        (tmp_path / "raw").mkdir(exist_ok=True)
        np.save(tmp_path / "raw" / f"{name}.npy", np.zeros((3, 6, 7), np.float32))
    np.save(tmp_path / "raw" / "mine.npy", np.zeros((3, 6, 7), np.float32))
    images, raw = images_of(tmp_path), MollifiedSamples(str(tmp_path), IDENTITY, 0.05, 3, None)
    assert [*map(images.item_name, range(len(images)))] == ["000001.png", "1234567.png"]
    assert [*map(raw.item_name, range(len(raw)))] == ["000001.npy", "1234567.npy"]
    told = f"{tmp_path}: left out %d pictures that were not drawn there, such as %s"
    assert caplog.messages == [told % (3, "000000.png"), told % (2, "000002.png")]


def test_stored_kinds_of_pictures(tmp_path):
    grey, clear = noise((6, 7), 1, channels=1), np.zeros((6, 7, 4), np.uint8)
    Image.fromarray(grey[..., 0]).save(tmp_path / "0.png")
    Image.fromarray(clear).save(tmp_path / "1.png")
    images = images_of(tmp_path)
    np.testing.assert_array_equal(images[0], grey.repeat(3, axis=2))
    np.testing.assert_array_equal(images[1], np.full((6, 7, 3), 255))
    data = micro.image(tmp_path, {"data.channels": 1})
    functions = DatasetImages(data, "train", 3)
    assert functions[0].shape == (16, 12, 3) and len(functions) == 24
    assert functions.path == "data.name=functions split train"


def test_mollified_samples_are_prepared_as_the_authors_do(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    x = np.array([[-1.2, -1.0, -0.001, 0.0, 0.0039, 0.9999, 1.0, 2.0]], np.float32)[None].repeat(3, axis=0)
    np.save(raw / "000003.npy", x)
    plain = MollifiedSamples(str(tmp_path), IDENTITY, 0.05, 3, None)
    stored = x.astype(np.float16).astype(np.float32)
    expected = np.floor(((stored + 1) / 2 * 255).clip(0, 255)).astype(np.uint8)
    np.testing.assert_array_equal(plain[0], expected.transpose(1, 2, 0))
    assert plain[0][0, 3].tolist() == [127] * 3  # 127.5, cut

    image = noise((32, 24), 1)
    mollifier = Mollifier(1.0, (32, 24))
    clean = torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1
    np.save(raw / "000003.npy", mollifier(clean).numpy())
    filtered = MollifiedSamples(str(tmp_path), mollifier, 0.01, 3, None)
    assert np.abs(filtered[0].astype(int) - image).mean() < 2
    assert filtered.fingerprint() != plain.fingerprint()
    with pytest.raises(ValueError, match="save_raw"):
        MollifiedSamples(str(raw), mollifier, 0.05, 3, None)


def plain_extractor() -> Extractor:
    """Three features of an image: the means of its channels."""
    return Extractor(name="means", metric="FD", resize="none", input_size=(20, 24), channels=3, weights="none",
                     prepare=lambda image: image.astype(np.float32), network=lambda x: x.mean(dim=(2, 3)))  # fmt: skip


def test_the_floor_is_the_distance_of_real_images(tmp_path, how):
    """Of as many as there are samples, to the rest."""
    real, samples = images_of(folder(tmp_path / "real", 30)), images_of(folder(tmp_path / "made", 10, first_seed=50))
    report = evaluate(samples, real, plain_extractor(), how)
    x = features(real, plain_extractor(), how)
    possible = []
    for seed in range(200):  # 10 against 20, however drawn, gives a distance of this size
        order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
        possible.append(frechet_distance(gaussian_of(x[order[10:]]), gaussian_of(x[order[:10]])))
    assert min(possible) < report["floor"] < max(possible)
    assert f"{report['floor']:.4f}" in table(report) and "its floor, that of 10 real images" in table(report)
    few = evaluate(samples, images_of(tmp_path / "real", limit=19), plain_extractor(), how)
    assert few["floor"] is None and "needs 20 reference images" in table(few)


def test_wrong_arguments_of_extractors():
    for arguments, part in (
        (("vgg",), "model is vgg; accepted: clip_vit_b_32"),
        (("random_features", CPU, "w.pt"), "random_features takes none"),
        (("inception_v3", CPU, "none.pt"), "none.pt: no such file"),
    ):
        with pytest.raises(ValueError, match=part):
            open_extractor(*(arguments if len(arguments) > 1 else (*arguments, CPU)))
