"""PSNR, SSIM and LPIPS against slow definitions and closed forms."""

import numpy as np
import pytest
import torch

from metrics.similarity import LPIPS_NETS, load_lpips, psnr, ssim


def pair(size: tuple[int, int], channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    a = torch.rand(2, channels, *size, generator=generator) * 2 - 1
    return a, (a + 0.2 * torch.randn(a.shape, generator=generator)).clamp(-1, 1)


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004 for one channel, window by window."""
    steps = np.arange(11) - 5
    window = np.exp(-(steps[:, None] ** 2 + steps[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    values = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            x, y = (z[top : top + 11, left : left + 11] for z in (a, b))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            vxy = (window * (x - mx) * (y - my)).sum()
            values.append((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


def test_psnr_of_a_constant_difference():
    a = torch.zeros(2, 3, 4, 5)
    assert psnr(a, a + 0.2).tolist() == pytest.approx([20.0, 20.0])
    assert psnr(a, a).tolist() == [float("inf")] * 2


@pytest.mark.parametrize("size", [(11, 11), (15, 23)])
def test_ssim_is_the_definition(size):
    a, b = pair(size)
    channels = [slow_ssim(x, y) for x, y in zip(a.flatten(0, 1).double().numpy(), b.flatten(0, 1).double().numpy())]
    expected = np.reshape(channels, (2, 3)).mean(axis=1)
    assert ssim(a, b).tolist() == pytest.approx(expected, rel=1e-10)
    assert ssim(a, a).tolist() == pytest.approx([1.0, 1.0])


def test_ssim_of_constant_images():
    a = torch.full((1, 1, 12, 12), 0.5)
    expected = (2 * 0.25 * 0.5 + 0.0004) / (0.25**2 + 0.5**2 + 0.0004)
    assert ssim(a, a - 0.25).item() == pytest.approx(expected)


def test_bad_pairs_are_refused():
    a, b = pair((12, 13))
    with pytest.raises(ValueError, match="one shape"):
        psnr(a, b[..., :12])
    with pytest.raises(ValueError, match="floating point"):
        ssim(a, torch.zeros(a.shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at least 11"):
        ssim(a[..., :10, :], b[..., :10, :])


@pytest.fixture(scope="module")
def squeeze_weights(tmp_path_factory) -> str:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(models.squeezenet1_1(weights=None).state_dict(), path)
    return str(path)


def test_lpips_uses_the_given_backbone(squeeze_weights):
    lpips = pytest.importorskip("lpips")
    distance = load_lpips("squeeze", squeeze_weights)
    a, b = pair((33, 40))
    assert distance(a, a).tolist() == [0.0, 0.0]
    torch.manual_seed(0)  # the package builds the same random backbone that was saved
    theirs = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    torch.testing.assert_close(distance(a, b), theirs(a, b).flatten().detach())
    grey, other = a[:, :1], b[:, :1]
    torch.testing.assert_close(distance(grey, other), distance(grey.repeat(1, 3, 1, 1), other.repeat(1, 3, 1, 1)))


def test_lpips_faults(squeeze_weights, tmp_path):
    pytest.importorskip("lpips")
    with pytest.raises(ValueError, match="alex, vgg, squeeze"):
        load_lpips("resnet")
    with pytest.raises(ValueError, match="no such file"):
        load_lpips("alex", tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"has no features\.0\.weight"):
        load_lpips("alex", squeeze_weights)
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match="cannot be read"):
        load_lpips("squeeze", tmp_path / "text.pth")
    smallest = LPIPS_NETS["squeeze"][1]
    distance = load_lpips("squeeze", squeeze_weights)
    a, b = pair((smallest - 1, 40))
    with pytest.raises(ValueError, match=f"at least {smallest} pixels"):
        distance(a, b)
    assert distance(*pair((smallest, smallest))).shape == (2,)


def test_weights_that_cannot_be_had_are_one_line(monkeypatch, tmp_path):
    pytest.importorskip("lpips")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(ValueError, match=r"alex backbone.*not in .*no network.*a file of weights") as caught:
        load_lpips("alex")
    assert "\n" not in str(caught.value)
