"""Fields: read from every kind of file, and back in their own units."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.datasets import open_dataset
from data.units import FieldUnits

H, W = 7, 10
VALUES = np.random.default_rng(0).normal(size=(6, 2, H, W)) * [[[3.0]], [[40.0]]] + 280


def section(root, **changes):
    """The data section of a configuration."""
    fields = {"name": "fields", "root_dir": str(root), "fields": "", "img_size": H, "img_width": W, "channels": 2,
              "anomalies": False, "on_error": "raise", "split": "published", "val_ratio": 0.0}  # fmt: skip
    return SimpleNamespace(**fields | changes)


def netcdf(path, **variables):
    netCDF4 = pytest.importorskip("netCDF4")
    with netCDF4.Dataset(path, "w") as file:
        for name, size in (("time", 6), ("y", H), ("x", W), ("bnds", 2)):
            file.createDimension(name, size)
        file.createVariable("time", "f8", ("time",)).bounds = "time_bnds"
        file.createVariable("time_bnds", "f8", ("time", "bnds"))[:] = 0
        for name, values in variables.items():
            stored = file.createVariable(name, "i2", ("time", "y", "x"), fill_value=-32768)
            stored.scale_factor, stored.add_offset = 0.01, 250.0
            stored[:] = np.ma.array(np.nan_to_num(values, nan=250.0), mask=np.isnan(values))


def written(folder, kind):
    """VALUES in a file, or files, of a kind; returns what to open, the changes of the section, and the values."""
    one = np.array([VALUES[:, 0] / 40 + 250])
    match kind:
        case "channels first":
            np.save(folder / "a.npy", VALUES)
        case "channels last, float32, compressed":
            single = VALUES.astype(np.float32)
            np.savez_compressed(folder / "a.npz", field=np.moveaxis(single, 1, 3), time=np.arange(6))
            return folder / "a.npz", {}, single.astype(np.float64)
        case "variables":
            np.savez(folder / "a.npz", u=VALUES[:, 0], v=VALUES[:, 1], other=np.zeros((3, 3)))
            return folder / "a.npz", {"fields": "u, v"}, VALUES
        case "folder of single fields":
            for i, field in enumerate(VALUES[:, 0]):
                np.save(folder / f"{i}.npy", field)
            return folder, {"channels": 1}, VALUES[:, :1]
        case "netcdf":
            one[0, 2, 3, 4] = np.nan
            netcdf(folder / "a.nc", temperature=one[0])
            return folder / "a.nc", {"channels": 1}, one.swapaxes(0, 1)
    return next(folder.iterdir()), {}, VALUES


KINDS = ("channels first", "channels last, float32, compressed", "variables", "folder of single fields", "netcdf")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_read_and_units_are_undone(tmp_path, kind):
    root, changes, values = written(tmp_path, kind)
    data = open_dataset(section(root, **changes), "train")
    found = torch.stack([data[i] for i in range(len(data))])
    assert found.dtype == torch.float32 and tuple(found.shape) == values.shape
    low, high = (reduce(values, axis=(0, 2, 3)) for reduce in (np.nanmin, np.nanmax))
    wanted = (values - low[:, None, None]) / (high - low)[:, None, None] * 2 - 1
    rounding = 0.02 / (high - low).min() if kind == "netcdf" else 0
    assert np.allclose(found, wanted, rtol=0, atol=1e-6 + rounding, equal_nan=True)
    assert np.allclose(
        data.units.undo(found.double()), values, rtol=1e-6, atol=1e-2 * (kind == "netcdf"), equal_nan=True
    )
    assert torch.allclose(data.units.apply(data.units.undo(found.double())), found, atol=1e-6, equal_nan=True)
    assert (data.partly_known, data.least_known) == (
        (True, {(H, W): H * W - 1}) if kind == "netcdf" else (False, {(H, W): H * W})
    )


def test_anomalies_are_differences_from_the_mean_map_of_training_fields(tmp_path):
    values = VALUES.copy()
    values[1, :, 2, 3] = values[:, :, 5, 5] = np.nan
    np.save(tmp_path / "a.npy", values)
    data = open_dataset(section(tmp_path, anomalies=True, val_ratio=0.3), "train")
    found = torch.stack([data[i] for i in range(len(data))]).double()
    chosen = values[[int(data.item_name(i)[6:-1]) for i in range(len(data))]]
    assert len(chosen) < len(values)
    known = np.isfinite(chosen)
    mean = np.where(known, chosen, 0).sum(0) / np.maximum(known.sum(0), 1)
    apart = chosen - mean
    for c in range(2):  # anomalies are scaled to [-1, 1]
        one, seen = found[:, c][torch.from_numpy(known[:, c])], apart[:, c][known[:, c]]
        low, high = seen.min(), seen.max()
        assert np.allclose(one, (seen - low) / (high - low) * 2 - 1, atol=1e-5)
    np.testing.assert_allclose(data.units.undo(found), chosen, rtol=1e-5)
    assert torch.allclose(data.units.apply(data.units.undo(found)).double(), found, atol=1e-4, equal_nan=True)
    again = FieldUnits.stored({"units": json.loads(json.dumps(dataclasses.asdict(data.units)))}, "a")
    assert again == data.units and again.common == data.units.common
    middle = np.nanquantile(chosen, (0.005, 0.995), axis=(0, 2, 3)).T  # of values, not of anomalies
    np.testing.assert_allclose(data.units.common, middle, rtol=1e-9)
    smooth = FieldUnits((1.0, 2.0), (2.0, 4.0), ("u", "v"), waves((4, 5)))
    at, sides = torch.tensor([[0.125, 0.3], [0.8, 0.5]]), torch.tensor([[0.0, 0.0], [0.2, 0.4]])
    larger = smooth.undo(torch.zeros(1, 2, 8, 10, dtype=torch.float64))
    assert np.allclose(larger[0], np.add(waves((8, 10)), [[[1.0]], [[2.0]]]))
    exact = [[math.cos(math.pi * 0.3), 3.0], [0.0, 3.0]]
    assert np.allclose(smooth.apply_at(torch.zeros(2, 2), at, sides), np.add(exact, [1, 2]) / [-2, -4])
    assert smooth.limits[1] == (1.0, 9.0)


def waves(size):
    """Two maps: a cosine from west to east, and a constant."""
    east = np.cos(math.pi * (np.arange(size[1]) + 0.5) / size[1])
    return tuple(tuple(map(tuple, one)) for one in (np.tile(east, (size[0], 1)), np.full(size, 3.0)))


def test_units_are_those_of_the_training_fields(tmp_path):
    values = VALUES.copy()
    np.save(tmp_path / "a.npy", values)
    held_out = [open_dataset(section(tmp_path, val_ratio=0.3), split) for split in ("train", "val", "all")]
    assert len(held_out[0]) + len(held_out[1]) == len(held_out[2]) == len(VALUES)
    assert held_out[0].units == held_out[1].units == held_out[2].units
    assert float(held_out[0].pixels.min()) == -1 and float(held_out[0].pixels.max()) == 1
    assert len({data.fingerprint() for data in held_out}) == 3
    assert torch.equal(
        held_out[0].units.undo(torch.ones(2, H, W), spread=True)[:, 0, 0], torch.tensor(held_out[0].units.scale)
    )


def nan_at(where):
    values = VALUES.copy()
    values[where] = np.nan
    return values


BAD = {
    "nothing there": (None, {"root_dir": "none"}, "does not exist"),
    "no files": (None, {}, "holds no file"),
    "not numbers": (VALUES.astype(complex), {}, "complex128; accepted: real numbers"),
    "objects": (np.array([None, 1], dtype=object), {}, "allow_pickle"),
    "axes": (VALUES[None], {}, "accepted: (H, W), (N, H, W)"),
    "channels": (VALUES, {"channels": 3}, "have 2 channels; accepted: 3"),
    "channels of one": (VALUES[:, 0], {}, "have 1 channels; accepted: 2"),
    "size": (VALUES, {"img_width": 9}, "accepted: a size of the fields: 7x10"),
    "too small": (VALUES[:, :, :3], {}, "sides of at least 4"),
    "empty": (VALUES[:0], {}, "at least one"),
    "infinite": (np.where(VALUES > VALUES.mean(), np.inf, VALUES), {}, "infinite; accepted: finite values, or nan"),
    "nothing known": (nan_at(...), {}, "no point has finite values"),
    "no common point": (nan_at((slice(None), 0)), {}, "no point has finite values"),
    "one unknown": (nan_at(3), {}, "a.npy[3] (and 0 more) has no known point"),
    "constant": (np.stack([VALUES[:, 0], np.full((6, H, W), 5.0)], 1), {}, "a[1] is 5 wherever it is known"),
    "no validation": (VALUES[:1], {"val_ratio": 0.1, "split_name": "val"}, "leaves no validation"),
    "damaged": (b"\x93NUMPY\x01\x00", {}, "a.npy"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_fields_are_named_in_one_line(tmp_path, name):
    content, changes, message = BAD[name]
    if isinstance(content, bytes):
        (tmp_path / "a.npy").write_bytes(content)
    elif content is not None:
        np.save(tmp_path / "a.npy", content, allow_pickle=True)
    changes = {"root_dir": tmp_path, **changes}
    split = changes.pop("split_name", "train")
    with pytest.raises(ValueError) as error:
        open_dataset(section(changes.pop("root_dir"), **changes), split)
    assert message in str(error.value) and "accepted" in str(error.value) and "\n" not in str(error.value)


def test_files_of_several_variables_and_damaged_ones_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", u=VALUES, v=VALUES)
    with pytest.raises(ValueError, match=r"variables u, v; accepted: one, or those that data\.fields names"):
        open_dataset(section(tmp_path), "train")
    with pytest.raises(ValueError, match=r"data\.fields names 'w'; accepted: u, v"):
        open_dataset(section(tmp_path, fields="w"), "train")
    pytest.importorskip("netCDF4")
    for name in ("a.npz", "a.nc"):
        (tmp_path / name).write_bytes(b"PK\3\4 or CDF")
        with pytest.raises(ValueError, match=rf"{name}: .*accepted: a \.npy, \.npz or NetCDF"):
            open_dataset(section(tmp_path / name), "train")
    skipped = tmp_path / "b.npy"
    np.save(skipped, nan_at(3))
    assert len(open_dataset(section(skipped, on_error="skip"), "train")) == 5
