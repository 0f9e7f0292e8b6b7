"""data/prepare.py: the pixels that training sees, the same bytes however they were made, and readable refusals."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch

from data.datasets import open_dataset
from data.images import ImageFiles
from data.prepare import plan
from data.prepared import Prepared, Work, verify
from data.sources import open_source
from faults.lines import snapshot
from faults.test_images_as_they_are import png
from forked import run
from runtime.lock import FolderLock
from test_data_images import SIZE, encode, make_folder, make_lmdb, make_zip, noise_image
from test_data_tars import data, make_tar


def pictures(count=20):
    """Photographs of several formats, sizes, bands and depths, in folders, with other files beside them."""
    files = {
        f"c{i % 3}/{i:03d}.png": encode(noise_image(i, 30 + i, 50, ("RGB", "RGBA", "L")[i % 3])) for i in range(count)
    }
    files |= {f"d/{i:03d}.jpg": encode(noise_image(i), "JPEG") for i in range(count // 2)}
    deep = np.random.default_rng(0).integers(0, 4096, (33, 40, 1))
    return files | {"e/deep.png": png(deep), "notes.txt": b"x"}


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def work(source, out, processes=1, on_error="raise", size=SIZE) -> Work:
    return plan(str(source), Prepared(Path(out)), size, 3, 6, on_error, processes)


def command(source, out, *more) -> CompletedProcess:
    return run(["data/prepare.py", f"--source={source}", f"--out={out}", "--size=12x20", "--shard_size=6", *more])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of pictures, with what is made of it by one process and by two."""
    place = tmp_path_factory.mktemp("made")
    source = make_folder(place / "source", pictures())
    for out in ("images.zip", "shards"):
        work(source, place / "1" / out).make()
        work(source, place / "2" / out, processes=2).make()
    return place


def test_the_bytes_do_not_depend_on_the_processes(made):
    assert contents(made / "1") == contents(made / "2")
    assert sorted(contents(made / "1")) == ["images.zip", "images.zip.json", "shards/prepared.json",
                                            *(f"shards/shard-00000{k}.tar" for k in range(6))]  # fmt: skip


@pytest.mark.parametrize("out", ["images.zip", "shards", "shards/shard-{000000..000005}.tar"])
def test_training_sees_what_it_sees_of_the_source(made, out):
    for split in ("train", "val"):
        wanted, found = (open_dataset(data(root), split) for root in (made / "source", made / "1" / out))
        assert [*map(found.item_name, range(len(found)))] == [*map(wanted.item_name, range(len(wanted)))]
        assert all(torch.equal(found[i], wanted[i]) for i in range(len(wanted))) and len(wanted) > 3


@pytest.mark.parametrize("make", [make_zip, make_tar, make_lmdb])
def test_other_sources_give_the_same(made, tmp_path, make):
    source = make(tmp_path / f"s.{make.__name__}", {k: v for k, v in pictures().items() if k.endswith("g")})
    work(source, tmp_path / "out").make()
    ours, theirs = (contents(folder) for folder in (tmp_path / "out", made / "1" / "shards"))
    assert {**ours, "prepared.json": ""} == {**theirs, "prepared.json": ""}


def test_the_description_has_every_checksum(made):
    for out in ("images.zip", "shards"):
        told = json.loads(Prepared(made / "1" / out).description.read_text())
        source = open_source(made / "1" / out)
        images = {name: hashlib.sha256(source.open(i).read()).hexdigest() for i, name in enumerate(source.names)}
        assert {name: digest for file in told["files"] for name, digest in file["images"].items()} == images
        files = {path.name: path for path in [made / "1" / out, *(made / "1" / out).glob("*")]}
        for file in told["files"]:
            content = files[file["file"]].read_bytes()
            assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert told["source"] == "source" and told["settings"]["size"] == [12, 20] and told["left_out"] == []


@pytest.mark.parametrize("out, processes", [("images.zip", 1), ("shards", 2)])
def test_a_killed_command_goes_on_where_it_was(made, tmp_path, monkeypatch, out, processes):
    slow = ImageFiles.decoded

    def decoded(self, i):
        time.sleep(0.005)
        (tmp_path / "decoded" / f"{i}-{time.monotonic_ns()}").touch()
        return slow(self, i)

    monkeypatch.setattr(ImageFiles, "decoded", decoded)
    (tmp_path / "decoded").mkdir()
    place = tmp_path / "place"
    for kill in (1, 3):  # when so many shards are whole
        child = os.fork()
        if not child:
            os.setpgrp()
            work(made / "source", place / out, processes).make()
            os._exit(0)
        while len(list(place.glob("*.parts/shard-*.json"))) < kill:
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not (place / out).exists()
        with pytest.raises(ValueError, match=r"made with another size; accepted"):
            work(made / "source", place / out, size=(9, 9))
    before = len(list((tmp_path / "decoded").iterdir()))
    work(made / "source", place / out, processes).make()
    again = len(list((tmp_path / "decoded").iterdir())) - before
    assert again <= 31 - 3 * 6 + (6 * 9 if processes > 1 else 0)  # workers of a killed parent finish a shard
    assert contents(place) == {name: digest for name, digest in contents(made / "1").items() if name.startswith(out)}
    work(made / "source", place / out).make()  # all is there
    assert len(list((tmp_path / "decoded").iterdir())) == before + again


def test_damaged_images_are_refused_or_counted(tmp_path):
    files = {f"{i}.png": encode(noise_image(i)) for i in range(8)}
    files |= {"2.png": files["2.png"][:900], "7.png": encode(noise_image(7, 9, 9))}
    source, out = make_folder(tmp_path / "source", files), tmp_path / "out"
    with pytest.raises(ValueError, match=r"^--source: .*7\.png is 9x9.*; --on_error=skip leaves"):
        work(source, out)
    assert not (tmp_path / "out.parts").exists()
    (source / "7.png").unlink()
    with pytest.raises(ValueError, match=r"^--source: 2\.png cannot be decoded.*; --on_error=skip leaves"):
        work(source, out, processes=2).make()
    (source / "7.png").write_bytes(files["7.png"])
    done = command(source, out, "--on_error=skip")  # of the same good headers: it goes on
    assert done.returncode == 0 and "(6 images, 2 left out; checksums in " in done.stdout, done.stderr
    assert json.loads((tmp_path / "out/prepared.json").read_text())["left_out"] == ["2.png", "7.png"]
    assert open_source(out).names == ["0.png", "1.png", "3.png", "4.png", "5.png", "6.png"]


def flip(path: Path, at: int = 700) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)


DAMAGES = {
    "shard": (
        "shards",
        lambda out: flip(out / "shard-000001.tar"),
        "shard-000001.tar is not as it was written (1 of 6",
    ),
    "header": ("shards", lambda out: flip(out / "shard-000001.tar", 0), "shard-000001.tar is not as it was written;"),
    "lost": ("shards", lambda out: (out / "shard-000002.tar").unlink(), "shard-000002.tar is not there"),
    "foreign": ("shards", lambda out: make_tar(out / "more.tar", {"a.png": b""}), "more.tar was not made here"),
    "zip": ("images.zip", lambda out: flip(out), "images.zip is not as it was written (1 of 31 images, such as "),
    "description": ("shards", lambda out: (out / "prepared.json").write_text("{}"), "prepared.json: lacks files"),
    "none": ("shards", lambda out: (out / "prepared.json").unlink(), "prepared.json: cannot be read"),
}


@pytest.mark.parametrize("out, damage, told", DAMAGES.values(), ids=DAMAGES)
def test_verify_finds(made, tmp_path, out, damage, told):
    for name in (out, "images.zip.json"):
        (shutil.copytree if (made / "1" / name).is_dir() else shutil.copy)(made / "1" / name, tmp_path / name)
    assert verify(Prepared(tmp_path / out)).endswith("31 images are as they were written")
    damage(tmp_path / out)
    with pytest.raises(ValueError, match=re.escape(told)) as refused:
        verify(Prepared(tmp_path / out))
    assert "\n" not in str(refused.value)


def test_what_is_there_stays(made, tmp_path):
    source, taken = made / "source", make_folder(tmp_path / "taken", {"a.txt": b"mine"})
    make_zip(tmp_path / "up.zip", {"../a.png": encode(noise_image(0))})
    make_folder(tmp_path / "twins", {"a.png": encode(noise_image(0)), "a.jpg": encode(noise_image(0), "JPEG")})
    make_zip(tmp_path / "taken.zip", {})
    make_folder(tmp_path, {"other.zip.json": b"[]"})
    before = snapshot(tmp_path) | snapshot(made)
    for told, given in {
        "taken, which was not made here; accepted": (source, taken),
        "taken.zip, which was not made here; accepted": (source, tmp_path / "taken.zip"),
        "other.zip.json: holds an array": (source, tmp_path / "other.zip"),
        "x.tar; accepted: result: NAME.zip": (source, tmp_path / "x.tar"),
        "--source: nowhere does not exist": ("nowhere", tmp_path / "x"),
        "with '../a.png'; accepted": (tmp_path / "up.zip", tmp_path / "x"),
        "a tar gives one image of several": (tmp_path / "twins", tmp_path / "x"),
    }.items():
        with pytest.raises(ValueError, match=re.escape(told)):
            work(*given)
    with FolderLock(tmp_path / "x.parts"), pytest.raises(ValueError, match=r"x\.parts: in use by process"):
        work(source, tmp_path / "x")
    (tmp_path / "x.parts").rmdir()
    assert snapshot(tmp_path) | snapshot(made) == before


def test_the_command_line(made, tmp_path):
    source = made / "source"
    for told, status, done in (
        ("--size is missing; accepted", 2, run(["data/prepare.py", f"--source={source}", f"--out={tmp_path / 'x'}"])),
        ("--source is x; accepted: --verify", 2, run(["data/prepare.py", "--source=x", "--out=x", "--verify"])),
        ("/proc/x.parts", 2, command(source, "/proc/x")),
        ("--out is .; accepted", 2, command(source, ".")),
        ("31 images, to be 12x20 (HxW) in", 0, command(source, tmp_path / "x", "--dry_run")),
        ("are as they were written", 0, run(["data/prepare.py", f"--out={made / '1/images.zip'}", "--verify"])),
    ):
        assert done.returncode == status and told in done.stderr + done.stdout, (told, done.stderr)
        assert "Traceback" not in done.stderr and done.stderr.count("error: ") == (status > 0), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_what_is_whole(made, tmp_path, monkeypatch):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, limit[1]))
    try:
        with pytest.raises(ValueError, match=r"shard-00000\d\.tar: cannot be written \(File too large"):
            work(made / "source", tmp_path / "shards").make()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)
    assert not (tmp_path / "shards").exists()
    work(made / "source", tmp_path / "shards").make()
    assert contents(tmp_path) == {n: d for n, d in contents(made / "1").items() if n.startswith("shards")}
