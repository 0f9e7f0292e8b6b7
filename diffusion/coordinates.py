"""Where functions are sampled: resolutions, subsets of the pixels, coordinates of pixels.

A function lives on the unit square [0, 1]², rows first. An image of resolution `size = (H, W)` samples it: if H and W
differ, pixels are not square, but the domain is. A pixel is named by its id, row · W + column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

Size = tuple[int, int]


def size_of(x: torch.Tensor) -> Size:
    """The last two sides of a tensor: (H, W) of images (..., H, W)."""
    height, width = x.shape[-2:]
    return height, width


@dataclass(frozen=True, eq=False)
class Points:
    """The pixels at which a batch of functions is known.

    size: (H, W), the resolution.
    index: int64 (B, M) pixel ids, without repetition within a row; None stands for every pixel of every function in
        row-major order, without storing the ids.
    """

    size: Size
    index: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """Number of points of one function: M, or H·W for every pixel."""
        return self.size[0] * self.size[1] if self.index is None else self.index.shape[1]

    @property
    def is_full(self) -> bool:
        """Whether the points are every pixel in row-major order, known without looking at the ids."""
        return self.index is None

    def ids(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Pixel ids, int64: (B, M) where the index is, or (1, H·W) on `device` for every pixel."""
        if self.index is None:
            return torch.arange(self.count, device=device).unsqueeze(0)
        return self.index if device is None else self.index.to(device)

    def rows_cols(self, device: torch.device | str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns of the points, int64, shaped like `ids`."""
        ids = self.ids(device)
        return ids.div(self.size[1], rounding_mode="floor"), ids.remainder(self.size[1])


def validate_points(points: Points) -> None:
    """Raise ValueError unless the ids are int64 (B, M) with M > 0, inside the image and distinct per function.

    Reads values back from the device, so it belongs at the borders of the program, not in a training step.
    """
    height, width = points.size
    if height < 1 or width < 1:
        raise ValueError(f"points.size is {points.size}; accepted: both sides at least 1")
    index = points.index
    if index is None:
        return
    if index.dtype != torch.int64 or index.ndim != 2 or index.shape[1] == 0:
        raise ValueError(
            f"points.index is {index.dtype} of shape {tuple(index.shape)}; "
            "accepted: torch.int64 of shape (B, M) with M > 0"
        )
    if index.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(index))
    if low < 0 or high >= height * width:
        raise ValueError(
            f"points.index is {low} to {high}; accepted: 0 to {height * width - 1}, the pixels of {height}x{width}"
        )
    ordered = index.sort(dim=1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ValueError("points.index repeats a pixel id; accepted: distinct ids within one function")


def image_to_points(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to the features (B, H·W, C) of every pixel; a view of contiguous and channels_last images."""
    return x.flatten(2).transpose(1, 2)


def points_to_image(values: torch.Tensor, size: Size) -> torch.Tensor:
    """Features (B, H·W, C) of every pixel to (B, C, H, W); a view, channels_last if they are contiguous."""
    return values.transpose(1, 2).unflatten(2, size)


def gather_points(x: torch.Tensor, points: Points) -> torch.Tensor:
    """Read an image (B, C, H, W) at the points: (B, M, C)."""
    if size_of(x) != tuple(points.size):
        raise ValueError(f"size of x is {size_of(x)}; accepted: {tuple(points.size)}, that of the points")
    features = image_to_points(x)
    if points.index is None:
        return features
    return features.gather(1, points.index.unsqueeze(2).expand(-1, -1, features.shape[2]))


def scatter_points(values: torch.Tensor, points: Points) -> torch.Tensor:
    """Write features (B, M, C) into an image (B, C, H, W) that is zero wherever there is no point."""
    if values.shape[1] != points.count:
        raise ValueError(f"values hold {values.shape[1]} points; accepted: {points.count}, those of `points`")
    if points.index is None:
        return points_to_image(values, points.size)
    batch, _, channels = values.shape
    image = values.new_zeros(batch, points.size[0] * points.size[1], channels)
    image = image.scatter(1, points.index.unsqueeze(2).expand(-1, -1, channels), values)
    return points_to_image(image, points.size)


@dataclass(frozen=True)
class CoordinateConvention:
    """What the coordinate of a pixel is, and how networks go between resolutions and grids.

    The only place that distinguishes the conventions; `CONVENTIONS` lists them.
    end_points: pixels 0 and n-1 sit on the border of the unit square; else pixels are the centres of n equal cells.
    align_corners, padding_mode: arguments of `torch.nn.functional.grid_sample` for reading the coarse grid.
    transposed_quadrant: pass (row, column) to the read as they are, as the published models do.
    shares_ties: points tied at the K-th distance from a node of the grid share its weight; else the first by pixel id
        are taken.
    overlaps_cells: at another resolution a kernel's values are averages over the cells of the pixels; else they are
        interpolated between the centres, and the window is rounded to whole pixels.
    """

    name: str
    end_points: bool
    align_corners: bool
    padding_mode: str
    transposed_quadrant: bool
    shares_ties: bool
    overlaps_cells: bool

    def pixel_coordinate(self, i: torch.Tensor, n: int) -> torch.Tensor:
        """Coordinate in [0, 1] of pixel i on an axis of n; i: integers, or fractions for positions between pixels."""
        i = i if i.is_floating_point() else i.float()
        return i / max(n - 1, 1) if self.end_points else (i + 0.5) / n

    def integer_geometry(self, n: int, u: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Put n pixels and u grid nodes of one axis on common integers, in which distances are exact.

        Returns `pixels` int64 (n,), `nodes` int64 (u,) and `denominator`: pixel i has the coordinate
        pixels[i] / denominator, node j has nodes[j] / denominator.
        """
        if self.end_points:
            steps_n, steps_u = max(n - 1, 1), max(u - 1, 1)
            denominator = math.lcm(steps_n, steps_u)
            return (
                torch.arange(n) * (denominator // steps_n),
                torch.arange(u) * (denominator // steps_u),
                denominator,
            )
        half = math.lcm(n, u)
        pixels = (2 * torch.arange(n) + 1) * (half // n)
        nodes = (2 * torch.arange(u) + 1) * (half // u)
        return pixels, nodes, 2 * half

    def grid_read_position(self, rows: torch.Tensor, cols: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The (x, y) that `grid_sample`, with the arguments of this convention, takes to read at (rows, cols)."""
        if self.transposed_quadrant:
            return rows, cols
        return 2 * cols - 1, 2 * rows - 1


CONVENTIONS: dict[str, CoordinateConvention] = {
    convention.name: convention
    for convention in (
        # Positions mean the same at every resolution: pixel i is the cell [i/n, (i+1)/n].
        CoordinateConvention(
            "cell_centred",
            end_points=False,
            align_corners=False,
            padding_mode="border",
            transposed_quadrant=False,
            shares_ties=True,
            overlaps_cells=True,
        ),
        # What the published models compute: end points, and a read confined to a transposed quadrant of the grid.
        CoordinateConvention(
            "reference",
            end_points=True,
            align_corners=False,
            padding_mode="zeros",
            transposed_quadrant=True,
            shares_ties=False,
            overlaps_cells=False,
        ),
        # The published coordinates and networks with the read at the coordinate itself.
        CoordinateConvention(
            "corner_aligned",
            end_points=True,
            align_corners=True,
            padding_mode="border",
            transposed_quadrant=False,
            shares_ties=False,
            overlaps_cells=False,
        ),
    )
}
