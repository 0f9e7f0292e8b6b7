"""What is measured of a function: sensors at points or over rectangles, known pixels, a lower resolution.

Each is a linear map H of images (B, C, H, W) to measurements (B, M), made of PyTorch operations: its adjoint is what
autograd computes. `diffusion.posterior` conditions on any of them.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import interpolate

from diffusion.coordinates import Size
from diffusion.cosine import dct, idct, on_rows
from diffusion.posterior import Observe, check_measurements, conjugate_residuals
from diffusion.series import series_values

_APART = 1e-9  # parts of a side within which two sensors are at one place
_SLACK = 1e-6  # of decimal fractions
_DEVIATION = 0.5  # of images in [-1, 1], about


class Sensors:
    """Sensors in the unit square, which read the cosine series of images: the same at every size.

    places: (P, 2), y then x, both from 0 to 1; pixel (i, j) of a lattice (H, W) is at ((i + ½)/H, (j + ½)/W).
    values: (P, C), what they read of each channel; NaN where one is not read.
    sd: standard deviation of their errors, 0 or more, a number or (P,).
    sides: (P, 2), height and width of the rectangle over which a sensor averages, 0 for a point; None for points alone.
        The rectangle must lie in the square.
    Raises ValueError for anything else, for no value, and for values without error that are not independent: two at
    one place.
    """

    def __init__(
        self,
        places: torch.Tensor,
        values: torch.Tensor,
        sd: float | torch.Tensor = 0.0,
        sides: torch.Tensor | None = None,
    ) -> None:
        self.places, self.values = torch.as_tensor(places).double(), torch.as_tensor(values).double()
        count = len(self.places)
        self.sides = torch.zeros(count, 2).double() if sides is None else torch.as_tensor(sides).double()
        self.sd = torch.as_tensor(sd).double()
        self.sd = self.sd.expand(count) if self.sd.ndim == 0 else self.sd
        for name, columns in (("places", 2), ("sides", 2), ("values", "C")):
            shape = tuple(getattr(self, name).shape)
            if len(shape) != 2 or shape[0] != count or shape[1] < 1 or columns not in ("C", shape[1]):
                raise ValueError(f"{name} of sensors have shape {shape}; accepted: ({count}, {columns})")
        low, high = self.places - self.sides / 2, self.places + self.sides / 2
        inside = ((low >= -_SLACK) & (high <= 1 + _SLACK) & (self.sides >= 0)).all(1)
        if not inside.all():
            i = int(inside.logical_not().nonzero()[0])
            y, x, height, width = (*self.places[i].tolist(), *self.sides[i].tolist())
            over = f" over {height:g} by {width:g}" if height or width else ""
            raise ValueError(
                f"sensor {i + 1} is at y {y:g}, x {x:g}{over}; accepted: places from 0 to 1, and what it averages over "
                "within that"
            )
        if tuple(self.sd.shape) != (count,) or not torch.all((self.sd >= 0) & (self.sd < math.inf)):
            raise ValueError(f"sd of sensors is {_some(self.sd)}; accepted: 0 or more, finite, one for all or for each")
        if self.values.isinf().any():
            raise ValueError("values of sensors are infinite; accepted: finite values, or nan where none is known")
        check_measurements(self.readings, self.variance)
        self._check_rank()

    def _check_rank(self) -> None:
        """Refuse values without error at one place."""
        exact = (self.sd == 0).nonzero()[:, 0]
        where = (torch.cat([self.places, self.sides], 1)[exact] / _APART).round()
        for channel in (~self.values.isnan()).T:
            rows, numbers = where[channel[exact]], exact[channel[exact]]
            _, group, counts = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)
            if len(counts) and counts.max() > 1:
                first, second = numbers[group == counts.argmax()][:2].tolist()
                raise ValueError(
                    f"sensors {first + 1} and {second + 1} are at one place and both without error; accepted: one of "
                    "them, or an sd above 0"
                )

    @property
    def _seen(self) -> torch.Tensor:
        return (~self.values.T.flatten().isnan()).nonzero()[:, 0]

    @property
    def readings(self) -> torch.Tensor:
        """What is read, float64 (M,): by channel, then by sensor."""
        return self.values.T.flatten()[self._seen]

    @property
    def variance(self) -> torch.Tensor:
        """The diagonal of R, float64 (M,)."""
        return self.sd.square().repeat(self.values.shape[1])[self._seen]

    @property
    def channels(self) -> int:
        """Channels C of what is measured."""
        return self.values.shape[1]

    def observer(self, device: torch.device) -> Observe:
        """H, for images on a device."""
        places, sides, seen = (x.to(device) for x in (self.places.clamp(0, 1), self.sides, self._seen))
        return lambda images: series_values(images, places, sides=sides).flatten(1)[:, seen]


def pixels(mask: torch.Tensor) -> Observe:
    """H for the pixels where a mask, bool (H, W), is true: by channel, then by pixel."""
    return lambda images: images[..., mask].flatten(1)


def reduced(images: torch.Tensor, size: Size) -> torch.Tensor:
    """Images (B, C, H, W) at a lower resolution by an antialiased bicubic filter."""
    return interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)


def lower_resolution(size: Size) -> Observe:
    """H for all pixels of images that are reduced to a size."""
    return lambda images: reduced(images, size).flatten(1)


def smooth_guess(
    observe: Observe, values: torch.Tensor, variance: torch.Tensor, channels: int, size: Size
) -> torch.Tensor:
    """The mean (1, C, H, W) of images given measurements, were they Gaussian fields with the spectrum of photographs.

    K Hᵗ (H K Hᵗ + R)⁻¹ y, where K multiplies the cosine coefficient (k, l) by c ∝ 1 / (1 + (k² + l²) / 2): a smooth
    surface through the measurements, to begin with. Arguments as in `diffusion.posterior.Measured`.
    """
    k, l = (torch.arange(n, dtype=values.dtype, device=values.device) for n in size)  # noqa: E741 (of the formula)
    spectrum = 1 / (1 + 0.5 * (k[:, None] ** 2 + l**2))
    spectrum = spectrum * (_DEVIATION**2 * math.prod(size) / spectrum.sum())
    with torch.enable_grad():
        image = torch.zeros(1, channels, *size, dtype=values.dtype, device=values.device, requires_grad=True)
        seen = observe(image)

    def spread(weights: torch.Tensor) -> torch.Tensor:
        (adjoint,) = torch.autograd.grad(seen, image, weights, retain_graph=True)
        return on_rows(idct, idct(on_rows(dct, dct(adjoint)) * spectrum))

    with torch.no_grad():
        return spread(conjugate_residuals(lambda w: observe(spread(w)) + variance * w, values[None]))


def _some(numbers: torch.Tensor) -> str:
    """The first few of numbers, for a message."""
    listed = [f"{number:g}" for number in numbers.flatten()[:4].tolist()]
    return ", ".join(listed) + (", …" if numbers.numel() > 4 else "")
