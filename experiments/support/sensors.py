"""Sensors that users give: a table, arrays, or a picture; and pictures of them."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from data.decoding import Decoder
from data.opening import open_regular
from data.pixels import to_float, to_pictures
from data.sources import FileSource, is_image_name
from data.units import FieldUnits
from diffusion.sensors import Sensors

ACCEPTED = (
    "a .csv or .npz with y, x from 0 to 1, value (or value1, value2, ... for channels), if wanted sd, height, width; "
    "or an image that is transparent where nothing is known"
)
_MOST = 100_000  # sensors
_LARGEST = 8.0  # of a value, where images are in [-1, 1]: up to 255 is a mistake
_SHOWN = 384  # side of a picture with sensors on it, about


def read_sensors(path: str, channels: int, sd: float, units: FieldUnits | None = None) -> Sensors:
    """The sensors of a file.

    Args:
        path: a table .csv with a header, arrays .npz of the same names, with values (P,) or (P, C), or an image, whose
            opaque pixels are point sensors at their centres.
        channels: of the model.
        sd: of their errors, where the file says nothing.
        units: of fields, which values and errors are then given in; the sensors returned have those of the model.
    Raises:
        ValueError: naming --sensors, for whatever is wrong with the file or the sensors.
    """
    where, suffix = Path(path).expanduser(), Path(path).suffix.lower()
    try:
        if suffix == ".csv":
            columns = _table(where)
        elif suffix == ".npz":
            columns = _arrays(where)
        elif is_image_name(where.name):
            columns = _picture(where, channels)
        else:
            raise ValueError(f"of another kind; accepted: {ACCEPTED}")
        return _sensors(columns, channels, sd, units)
    except (OSError, ValueError) as error:
        said = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise ValueError(
            f"--sensors is {path}: {said}{'' if 'accepted' in said else f'; accepted: {ACCEPTED}'}"
        ) from None


def _table(path: Path) -> dict[str, np.ndarray]:
    with open_regular(path) as file:
        text = file.read().decode("utf-8-sig")
    lines = [line for line in csv.reader(io.StringIO(text)) if any(cell.strip() for cell in line)]
    if not lines:
        raise ValueError("holds no line")
    names = [name.strip().lower() for name in lines[0]]
    if len(set(names)) < len(names):
        raise ValueError(f"its header {','.join(names)[:100]} names a column twice")
    rows = []
    for number, line in enumerate(lines[1:], 1):
        try:
            rows.append([float(cell) if cell.strip() else np.nan for cell in line])
        except ValueError:
            raise ValueError(f"sensor {number} is {','.join(line)[:100]}, which are not numbers") from None
        if len(line) != len(names):
            raise ValueError(f"sensor {number} has {len(line)} columns; accepted: the {len(names)} of the header")
    return dict(zip(names, np.array(rows, dtype=np.float64).reshape(-1, len(names)).T))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
            columns = {name.lower(): np.asarray(arrays[name]) for name in arrays.files}
    except (zipfile.BadZipFile, EOFError, KeyError) as error:
        raise ValueError(f"cannot be read ({error})") from None
    for name, column in columns.items():
        if column.dtype.kind not in "fiu":
            raise ValueError(f"{name} is {column.dtype}; accepted: numbers")
    return columns


def _picture(path: Path, channels: int) -> dict[str, np.ndarray]:
    if channels not in (1, 3):
        raise ValueError(f"an image; accepted for {channels} channels: a .csv or .npz")
    picture = Decoder(FileSource(path), 4)(0)
    known = np.asarray(picture.getchannel("A")) > 127
    if known.all():
        raise ValueError("no pixel is transparent; accepted: an image that is transparent where nothing is known")
    values = to_float(torch.from_numpy(np.array(picture.convert("RGB" if channels == 3 else "L")))).double().numpy()
    y, x = np.nonzero(known)
    return {"y": (y + 0.5) / known.shape[0], "x": (x + 0.5) / known.shape[1], "value": values[known]}


def _sensors(columns: dict[str, np.ndarray], channels: int, sd: float, units: FieldUnits | None) -> Sensors:
    numbered = sorted((name for name in columns if re.fullmatch(r"value[1-9]", name)), key=lambda name: int(name[5:]))
    others = {"y", "x", "value", "sd", "height", "width", *numbered}
    if strange := columns.keys() - others:
        raise ValueError(f"{min(strange)[:50]!r} is no column; accepted: {ACCEPTED}")
    if not {"y", "x"} <= columns.keys() or ("value" in columns) == bool(numbered):
        raise ValueError(f"columns are {', '.join(columns)[:100] or 'none'}; accepted: {ACCEPTED}")
    shapes = {name: column.shape[:1] for name, column in columns.items()}
    if len(set(shapes.values())) > 1 or any(c.ndim != 1 for n, c in columns.items() if n != "value"):
        raise ValueError("its arrays have different lengths or shapes; accepted: (P,), and values (P,) or (P, C)")
    count = len(columns["y"])
    if not 0 < count <= _MOST:
        raise ValueError(f"has {count} sensors; accepted: 1 to {_MOST}")
    values = np.stack([columns[name] for name in numbered], 1) if numbered else columns["value"].reshape(count, -1)
    if values.shape[1] != channels:
        raise ValueError(f"has values of {values.shape[1]} channels; accepted: {channels}, as the model")
    errors = np.broadcast_to(np.asarray(columns.get("sd", sd), dtype=np.float64), (count,))
    sides = np.stack([columns.get(name, np.zeros(count)) for name in ("height", "width")], 1)
    places = np.stack([columns["y"], columns["x"]], 1)
    if units is not None:
        given, values = values, units.apply_at(*map(torch.as_tensor, (values, places, sides))).numpy()
    if (far := np.nanmax(np.abs(values), initial=0)) > _LARGEST:
        if units is None:
            raise ValueError(f"values reach {far:g}; accepted: values of images in [-1, 1]")
        c = int(np.nanmax(np.abs(values), axis=0, initial=0).argmax())
        low, high = units.limits[c]
        raise ValueError(
            f"values of channel {c + 1} go from {np.nanmin(given[:, c]):g} to {np.nanmax(given[:, c]):g}; accepted: "
            f"about those of the training fields, {low:g} to {high:g}"
        )
    if units is not None:  # errors differ by channel, so each channel has sensors of its own
        errors = np.concatenate([errors / scale for scale in units.scale])
        places, sides = (np.tile(part, (channels, 1)) for part in (places, sides))
        apart = np.full((channels, count, channels), np.nan)
        apart[range(channels), :, range(channels)] = values.T
        values = apart.reshape(-1, channels)
    return Sensors(*(torch.tensor(part, dtype=torch.float64) for part in (places, values, errors, sides)))


def of_first_channel(sensors: Sensors) -> Sensors:
    """What sensors measure of channel 1 alone."""
    seen = ~sensors.values[:, 0].isnan()
    if not seen.any():
        return sensors
    return Sensors(sensors.places[seen], sensors.values[seen, :1], sensors.sd[seen], sensors.sides[seen])


def with_sensors(
    image: torch.Tensor | None, sensors: Sensors, size: tuple[int, int], origin: str = "upper"
) -> torch.Tensor:
    """An image (C, H, W) in [-1, 1], or grey, enlarged, with its sensors on it in the colours that they read.

    origin: where row 0 is shown, one of `data.field_pictures.ORIGINS`.
    """
    factor = max(1, round(_SHOWN / max(size)))
    height, width = factor * size[0], factor * size[1]
    base = to_pictures((torch.zeros(1, 1, 1, 1) if image is None else image[None]).clamp(-1, 1))[0].convert("RGB")
    picture = base.resize((width, height), Image.Resampling.NEAREST)
    colours = to_pictures(sensors.values.nan_to_num().float().clamp(-1, 1).T[None, :, :, None])[0].convert("RGB")
    draw = ImageDraw.Draw(picture)
    least = 3 if len(sensors.places) < 500 else 1  # pixels from the middle of a point to its outline
    for i, ((y, x), sides) in enumerate(zip(sensors.places.tolist(), sensors.sides.tolist())):
        half_h, half_w = (max(least, side * n / 2) for side, n in zip(sides, (height, width)))
        box = (x * width - half_w, y * height - half_h, x * width + half_w, y * height + half_h)
        draw.rectangle([round(edge) for edge in box], fill=colours.getpixel((0, i)), outline="white")
        if least > 1:
            draw.rectangle([round(e + s) for e, s in zip(box, (-1, -1, 1, 1))], outline="black")
    shown = to_float(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return shown.flip(1) if origin == "lower" else shown


def moments(files: list[Path], shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the arrays of files, float32, of which one is held at a time; 0 for one file."""
    mean, squares = np.zeros(shape), np.zeros(shape)
    for i, file in enumerate(files, 1):
        step = np.load(file, allow_pickle=False) - mean
        mean += step / i
        squares += step * (step - step / i)
    return torch.from_numpy(mean).float(), torch.from_numpy(np.sqrt(squares / max(1, len(files) - 1))).float()
