"""How alike two images are: PSNR, SSIM and LPIPS, each per pair. Images are (B, C, H, W) in [−1, 1] unless said."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from metrics.weights import cached_or_downloaded, hub_folder, read_state_dict

LPIPS_NETS = {"alex": ("AlexNet_Weights", 31), "vgg": ("VGG16_Weights", 16), "squeeze": ("SqueezeNet1_1_Weights", 17)}
SSIM_WINDOW, _WINDOW_SIGMA = 11, 1.5  # pixels; Wang et al. 2004, section III.B
_K1, _K2, _RANGE = 0.01, 0.03, 2.0  # of values from −1 to 1

PairDistance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio, 10·log₁₀(R² / mean (a − b)²), R = 2.

    Args:
        a, b: (B, C, H, W), floating point.
    Returns:
        (B,) in decibel, float64; infinite for equal images.
    Raises:
        ValueError: when the shapes differ or the images are not floating point.
    """
    _check_pair(a, b)
    error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(_RANGE**2 / error)


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity of Wang et al. 2004, equation (13), averaged over places and channels.

    Means, variances and covariance are taken in an 11×11 Gaussian window of σ = 1.5 pixels, at the places where it
    lies within the image; C₁ = (0.01 R)², C₂ = (0.03 R)², R = 2.

    Args:
        a, b: (B, C, H, W), floating point, H and W at least 11.
    Returns:
        (B,) in [−1, 1], float64; 1 for equal images.
    Raises:
        ValueError: when the shapes differ, or the images are not floating point or smaller than the window.
    """
    _check_pair(a, b)
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"images: {tuple(a.shape)}; accepted: height and width of at least {SSIM_WINDOW} for SSIM")
    a, b = a.double(), b.double()
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    var_a = _window_mean(a * a) - mean_a * mean_a
    var_b = _window_mean(b * b) - mean_b * mean_b
    covariance = _window_mean(a * b) - mean_a * mean_b
    c1, c2 = (_K1 * _RANGE) ** 2, (_K2 * _RANGE) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def load_lpips(
    net: str = "alex", weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> PairDistance:
    """The LPIPS distance (Zhang et al. 2018, version 0.1) as a function of two batches.

    The calibration comes with the package lpips; the backbone is torchvision's ImageNet classifier.

    Args:
        net: "alex" (the usual choice), "vgg" or "squeeze".
        weights: torchvision's file of the backbone; by default the one in torch's cache, else it is downloaded.
        device: where to compute.
    Returns:
        f(a, b) for images (B, 1 or 3, H, W) in [−1, 1], giving distances (B,) ≥ 0, 0 for equal images.
    Raises:
        ValueError: when the package or the weights are missing or do not fit.
    """
    if net not in LPIPS_NETS:
        raise ValueError(f"net={net!r}; accepted: {', '.join(LPIPS_NETS)}")
    try:
        import lpips
    except ImportError:
        raise ValueError("LPIPS needs the package lpips; accepted: pip install lpips, or another metric") from None
    import torchvision.models

    smallest = LPIPS_NETS[net][1]
    # The package's own constructor would download the backbone with no word about what failed.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision the old way
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    model.net.load_state_dict(_backbone(model.net, torchvision.models, net, weights))
    model.to(device).requires_grad_(False)

    @torch.no_grad()
    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        _check_pair(a, b)
        if a.shape[1] not in (1, 3) or min(a.shape[-2:]) < smallest:
            raise ValueError(
                f"images: {tuple(a.shape)}; accepted: 1 or 3 channels, at least {smallest} pixels a side for {net}"
            )
        a, b = (x.to(device, torch.float32).expand(-1, 3, -1, -1) for x in (a, b))
        return model(a, b).flatten().cpu()

    return distance


def _backbone(module: nn.Module, library, net: str, weights: str | Path | None) -> dict[str, torch.Tensor]:
    """Torchvision's parameters under the names of `module`, whose layer "slice2.3" is torchvision's "features.3"."""
    published = getattr(library, LPIPS_NETS[net][0]).IMAGENET1K_V1
    if weights is None:
        name = published.url.rpartition("/")[2]  # "alexnet-owt-7be5be79.pth": the last part begins its digest
        cached = hub_folder() / name
        digest = Path(name).stem.rpartition("-")[2]
        weights = cached_or_downloaded(f"the {net} backbone of LPIPS", cached, [published.url], digest)
    state = read_state_dict(weights)
    found = {}
    for name, like in module.state_dict().items():
        key = f"features.{name.partition('.')[2]}"
        if key not in state or state[key].shape != like.shape:
            shape = tuple(like.shape)
            raise ValueError(f"{weights}: has no {key} of shape {shape}; accepted: torchvision's {net} weights")
        found[name] = state[key]
    return found


def _window_mean(x: torch.Tensor) -> torch.Tensor:
    """Gaussian-weighted mean of (B, C, H, W) at each place of the window."""
    offsets = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    weights = torch.exp(-0.5 * (offsets / _WINDOW_SIGMA).square())
    weights = weights / weights.sum()
    flat = x.flatten(0, 1)[:, None]
    flat = functional.conv2d(functional.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return flat.view(*x.shape[:2], *flat.shape[-2:])


def _check_pair(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"images: {tuple(a.shape)} and {tuple(b.shape)}; accepted: two of one shape (B, C, H, W)")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(f"images: {a.dtype} and {b.dtype}; accepted: floating point values")
