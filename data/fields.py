"""Fields: float arrays on lattices of any size, in which NaN says that a value is not known.

They are read from .npy, .npz and NetCDF files, alone or all of a folder. Arrays have the axes

    (H, W)  one field,    (N, H, W)  N fields,    (N, C, H, W) or (N, H, W, C)  N fields of C channels;

where both of the last fit, channels come first. Several variables of a file are the channels of its fields. A point is
known where all channels are.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.base import digest
from data.decoding import one_line
from data.opening import LARGEST, check_regular, open_regular
from data.sources import existing_path
from data.units import FieldUnits, Maps
from diffusion.conditioning import fill_unknown

ENDINGS = (".npy", ".npz", ".nc")
ACCEPTED = "a .npy, .npz or NetCDF (.nc) file of numbers, or a folder of them"
_Array = np.ndarray
_COMMON = (0.005, 0.995)  # the middle 99 % of values


def read_fields(root_dir: str, fields: str, channels: int) -> tuple[list[_Array], list[str], tuple[str, ...]]:
    """All fields of a file or a folder, float64 (C, H, W) with NaN where not known, their names, and those of channels.

    Args:
        root_dir: file or folder.
        fields: names of variables with commas between; empty for the only one of a file that has at least two axes.
        channels: C.
    Raises:
        ValueError: one line that names the file and what is wrong with it.
    """
    root = existing_path(root_dir, accepted=ACCEPTED)
    files = [root] if root.is_file() else sorted(path for path in root.iterdir() if path.suffix.lower() in ENDINGS)
    if not files:
        raise ValueError(f"data.root_dir: {root} holds no file {', '.join(ENDINGS)}; accepted: {ACCEPTED}")
    wanted = [name.strip() for name in fields.split(",") if name.strip()]
    found: list[_Array] = []
    names: list[str] = []
    called: tuple[str, ...] = ()
    for path in files:
        try:
            variables = _read(path, wanted)
            stacked = _stacked(variables, channels)
        except ImportError as error:
            raise ValueError(
                f"data.root_dir: {path} needs the package netCDF4 ({error}); accepted: it, or .npz"
            ) from None
        except Exception as error:  # damaged archives and headers of arrays raise nearly anything
            said = one_line(error)
            hint = "" if "accepted" in said else f"; accepted: {ACCEPTED}"
            raise ValueError(f"data.root_dir: {path}: {said}{hint}") from error
        called = called or _channel_names(list(variables), channels)
        found += list(stacked)
        names += [f"{path.name}[{i}]" for i in range(len(stacked))]
    return found, names, called


def _read(path: Path, wanted: Sequence[str]) -> dict[str, _Array]:
    """The variables of a file by name, in the order wanted."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"of another kind; accepted: {ACCEPTED}")
    if path.suffix.lower() == ".nc":
        return _of_netcdf(path, wanted)
    with open_regular(path) as file:
        if path.suffix.lower() == ".npy":
            return {path.stem: np.load(file, allow_pickle=False)}
        with zipfile.ZipFile(file) as archive:
            if max((member.file_size for member in archive.infolist()), default=0) > LARGEST:
                raise ValueError(f"an array is too large; accepted: at most {LARGEST} bytes")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            chosen = wanted or _only([name for name in arrays.files if arrays[name].ndim >= 2])
            return {name: arrays[_present(name, arrays.files)] for name in chosen}


def _of_netcdf(path: Path, wanted: Sequence[str]) -> dict[str, _Array]:
    import netCDF4

    check_regular(path)
    with netCDF4.Dataset(path) as file:
        bounds = {getattr(variable, "bounds", "") for variable in file.variables.values()}
        wide = [name for name, variable in file.variables.items() if variable.ndim >= 2 and name not in bounds]
        chosen = wanted or _only(wide)
        read = {name: file.variables[_present(name, list(file.variables))][...] for name in chosen}
    # What the file says is missing is masked; it has been scaled as the file says.
    return {
        name: np.ma.filled(v.astype(np.float64), np.nan) if np.ma.isMaskedArray(v) and v.dtype.kind in "fiu" else v
        for name, v in read.items()
    }


def _only(names: list[str]) -> list[str]:
    if len(names) != 1:
        listed = ", ".join(names) or "none of at least two axes"
        raise ValueError(f"holds the variables {listed}; accepted: one, or those that data.fields names")
    return names


def _present(name: str, names: Sequence[str]) -> str:
    if name not in names:
        raise ValueError(f"data.fields names {name!r}; accepted: {', '.join(names)}")
    return name


def _stacked(variables: dict[str, _Array], channels: int) -> _Array:
    """Fields (N, C, H, W), float64."""
    parts = [_as_fields(name, array, channels if len(variables) == 1 else 1) for name, array in variables.items()]
    shapes = {part.shape for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"variables have shapes {sorted(shapes)}; accepted: one shape for all channels")
    fields = np.concatenate(parts, axis=1)
    if fields.shape[1] != channels:
        raise ValueError(f"fields have {fields.shape[1]} channels; accepted: {channels}, as data.channels says")
    if not fields.size or min(fields.shape[2:]) < 4:
        raise ValueError(f"fields have shape {fields.shape}; accepted: at least one, with sides of at least 4 points")
    if np.isinf(fields).any():
        raise ValueError("values are infinite; accepted: finite values, or nan where none is known")
    if not np.isfinite(fields).all(1).any():
        raise ValueError("no point has finite values; accepted: some, and nan where none is known")
    return fields


def _as_fields(name: str, array: _Array, channels: int) -> _Array:
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} is {array.dtype}; accepted: real numbers")
    if array.ndim in (2, 3):
        array = array.reshape(-1, 1, *array.shape[-2:])
    elif array.ndim == 4 and array.shape[1] != channels and array.shape[3] == channels:
        array = np.moveaxis(array, 3, 1)
    elif array.ndim != 4:
        raise ValueError(f"{name} has shape {array.shape}; accepted: (H, W), (N, H, W), (N, C, H, W), (N, H, W, C)")
    return array.astype(np.float64)


def _channel_names(variables: list[str], channels: int) -> tuple[str, ...]:
    if len(variables) == channels:
        return tuple(variables)
    return tuple(f"{variables[0]}[{c}]" for c in range(channels))


def measured_units(
    fields: Sequence[_Array], names: tuple[str, ...], mean_size: tuple[int, int] | None = None
) -> FieldUnits:
    """Units in which the known values of fields (C, H, W) reach from -1 to 1; ValueError where a channel is constant.

    The range, and not a deviation: samplers keep estimates in [-1, 1], and must cut nothing off.
    mean_size: subtract the mean map of the fields of this size first. Where no field is known, it is filled smoothly.
    """
    mean: Maps = ()
    known = _known(fields)
    common = np.quantile(known, _COMMON, axis=1).T.tolist()
    if mean_size is not None:
        some = [field for field in fields if field.shape[1:] == mean_size]
        if not some:
            raise ValueError("data.anomalies is True; accepted: False, where no training field has the training size")
        mean = _mean_map(some)
        without = FieldUnits((0.0,) * len(names), (1.0,) * len(names), names, mean)
        known = _known([without.apply(torch.from_numpy(field)).double().numpy() for field in fields])
    lows, highs = known.min(1), known.max(1)
    offset, scale = lows / 2 + highs / 2, highs / 2 - lows / 2
    for c, name in enumerate(names):
        if not scale[c] > 1e-9 * abs(offset[c]):
            raise ValueError(
                f"data.root_dir: {name} is {offset[c]:g} wherever it is known; accepted: values that differ"
            )
    return FieldUnits(tuple(offset.tolist()), tuple(scale.tolist()), names, mean, tuple(map(tuple, common)))


def _known(fields: Sequence[_Array]) -> _Array:
    """The values (C, N) of fields (C, H, W) at the points where all channels are known."""
    return np.concatenate([field[:, np.isfinite(field).all(0)] for field in fields], axis=1)


def _mean_map(fields: Sequence[_Array]) -> Maps:
    known = np.array([np.isfinite(field).all(0) for field in fields])[:, None]
    count = known.sum(0)
    total = np.where(known, fields, 0.0).sum(0)
    mean = torch.from_numpy(np.where(count, total / np.maximum(count, 1), np.nan))[None]
    return tuple(tuple(map(tuple, one)) for one in fill_unknown(mean)[0].tolist())


class FieldSet:
    """Chosen fields in the units of the model, as `ImageDataset`; items are float32 (C, H, W), NaN where not known.

    Always in memory. Fields may have several sizes; those of one size follow each other.

    size: that of training, which one of the fields at least has. groups: the numbers of the items of each size.
    partly_known: whether an item has NaN. least_known: by size, the known points of the item that has the fewest.
    """

    name = "fields"

    def __init__(
        self, fields: Sequence[_Array], names: Sequence[str], units: FieldUnits, size: tuple[int, int], split: str
    ) -> None:
        order = sorted(range(len(fields)), key=lambda i: fields[i].shape)  # stable
        self._items = [units.apply(torch.from_numpy(fields[i])).contiguous() for i in order]
        for item in self._items:
            item[:, item.isnan().any(0)] = torch.nan
        self._names, self._split = [names[i] for i in order], split
        self.units, self.size, self.channels = units, size, len(units.names)
        shapes = [tuple(item.shape[1:]) for item in self._items]
        self.groups = [[i for i, shape in enumerate(shapes) if shape == one] for one in dict.fromkeys(shapes)]
        self.pixels = torch.stack(self._items) if len(self.groups) == 1 else None
        self.partly_known = any(bool(item.isnan().any()) for item in self._items)
        known = [int(item[0].isfinite().sum()) for item in self._items]
        self.least_known = {shapes[group[0]]: min(known[i] for i in group) for group in self.groups}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> torch.Tensor:
        if not 0 <= i < len(self):
            raise IndexError(f"field {i} of {len(self)}")
        return self._items[i]

    def item_name(self, i: int) -> str:
        return self._names[i]

    def fingerprint(self) -> str:
        """Of the values that are known, their units, sizes, names and the split."""
        known = {"name": self.name, "size": self.size, "split": self._split, "units": repr(self.units)}
        known |= {"mean": self.units.mean} if self.units.mean else {}
        items = (
            f"{n} {hashlib.sha256(x.numpy().tobytes()).hexdigest()} {tuple(x.shape)}"
            for n, x in zip(self._names, self._items)
        )
        return digest(known, items)


def open_fields(cfg: Any, split: str, size: tuple[int, int], split_by: Any) -> FieldSet:
    """The fields of a configuration's data section; units are those of its training fields.

    split_by: names -> positions by "train" and "val". Fields without a known point are refused, or with on_error=skip
    left out.
    """
    fields, names, called = read_fields(cfg.root_dir, cfg.fields, cfg.channels)
    empty = [i for i, field in enumerate(fields) if not np.isfinite(field).all(0).any()]
    if empty and cfg.on_error != "skip":
        raise ValueError(
            f"data.root_dir: {names[empty[0]]} (and {len(empty) - 1} more) has no known point; accepted: some in each, "
            "or data.on_error=skip"
        )
    kept = [i for i in range(len(fields)) if i not in set(empty)]
    fields, names = [fields[i] for i in kept], [names[i] for i in kept]
    sizes = [field.shape[1:] for field in fields]
    if tuple(size) not in sizes:
        listed = ", ".join(f"{h}x{w}" for h, w in sorted(set(sizes)))
        raise ValueError(
            f"data.img_size, data.img_width are {size[0]}, {size[1]}; accepted: a size of the fields: {listed}"
        )
    parts = split_by(names)
    units = measured_units([fields[i] for i in parts["train"]], called, size if cfg.anomalies else None)
    chosen = parts["train"] + parts["val"] if split == "all" else parts[split]
    return FieldSet([fields[i] for i in chosen], [names[i] for i in chosen], units, size, split)
