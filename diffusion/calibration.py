"""The Wiener filter that undoes the mollifier, fitted frequency by frequency to images and what a model makes of them.

With cosine coefficients x_k of an image and y_k of its mollified reconstruction, y ≈ T x, the best factor is

    W_k = E[x_k y_k] / E[y_k²] = g_k / (g_k² + ν_k),   ν_k = g_k E[y_k²] / E[x_k y_k] - g_k²,

a Wiener filter whose inverse signal-to-noise ratio √ν_k depends on the frequency: that of the errors, if they are
independent of the image. Means are over images, and over frequencies of about the same length, so that the ratio is a
function of one number and holds at other resolutions.
"""

from __future__ import annotations

import torch

from diffusion.by_frequency import bands
from diffusion.cosine import dct, on_rows
from diffusion.mollifier import InverseSnr, Mollifier

# The correlation of n independent pairs has a standard deviation of 1 / √n, and exceeds four of them by chance once in
# thirty thousand.
_SIGNIFICANT = 4.0
_RANGE = 1e-3, 1e3  # of the ratio: from the inverse itself to nearly nothing


class InverseSnrFit:
    """Sums over images and their reconstructions, from which `result` makes an `InverseSnr`.

    mollifier: of kind "dct", with sigma above 0.
    Raises ValueError for another one.
    """

    def __init__(self, mollifier: Mollifier) -> None:
        if mollifier.identity:
            raise ValueError("mollifier sigma is 0; accepted: above 0, else there is nothing to undo")
        self._gain = mollifier.gain(mollifier.train_size)
        self.spacing, self._weights = bands(mollifier.frequencies(mollifier.train_size), mollifier.train_size)
        self._size, self._images = mollifier.train_size, 0
        self._sums = torch.zeros(5, len(self._weights), dtype=torch.float64)  # over images and the modes of a band

    def add(self, images: torch.Tensor, mollified: torch.Tensor) -> None:
        """Count images (B, C, H, W) and their mollified reconstructions, at the training resolution."""
        if images.shape != mollified.shape or tuple(images.shape[-2:]) != tuple(self._size):
            raise ValueError(
                f"images are {tuple(images.shape)}, reconstructions {tuple(mollified.shape)}; "
                f"accepted: both (B, C, {self._size[0]}, {self._size[1]})"
            )
        x, y = (on_rows(dct, dct(part.detach().double().cpu())) for part in (images, mollified))
        g, xy, xx, yy = self._gain, x * y, x.square(), y.square()
        found = g**2 * (yy - g * xy), g * xy, xy, xx, yy
        self._sums += torch.stack([self._weights @ part.sum(dim=(0, 1)).flatten() for part in found])
        self._images += len(images)

    def result(self) -> InverseSnr:
        """The ratios, up to the first frequency at which reconstructions show nothing of the images.

        Raises:
            ValueError: when there is no frequency at which they do.
        """
        errors, signal, xy, xx, yy = self._sums
        pairs = self._images * self._weights.sum(dim=1)  # channels are not independent
        correlated = xy * pairs.sqrt() > _SIGNIFICANT * (xx * yy).sqrt()
        shown = (correlated & (signal > 0)).int().cumprod(0).bool()
        if not shown.any():
            raise ValueError("reconstructions have nothing in common with the images; accepted: a trained model's")
        ratios = (errors[shown] / signal[shown]).clamp(min=0).sqrt().clamp(*_RANGE)
        return InverseSnr(self.spacing, tuple(ratios.tolist()))
