"""Tar archives: the images of the same folder, found without reading them, and readable refusals."""

import logging
import os
import random
import re
import tarfile
from types import SimpleNamespace

import pytest
import torch

from data.datasets import open_dataset
from data.loader import batches
from data.sources import FolderSource, open_source, stored_bytes
from data.tars import matching
from test_data_images import SIZE, encode, example_files, make_folder, make_tar, noise_image

LONG = "of a class/" * 15


def read(source):
    return {name: stored_bytes(source, i) for i, name in enumerate(source.names)}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_holds_the_images_of_its_folder(tmp_path, kind, caplog):
    long = f"{LONG if kind != tarfile.USTAR_FORMAT else LONG[:110]}ä{'n' * 90}.jpg"
    files = example_files() | {long: b"1" * 513, "b.webp": b"", "../../up.png": b"2", "/abs.png": b"3"}
    beside = {
        "part0/img000.txt": b"label",
        "part0/img000.cls": b"1",
        ".x.png": b"",
        "a.svg": b"",
        "dir": {"type": b"5"},
    }
    members = [(f"./{name}" if name[0] == "p" else name, what) for name, what in (files | beside).items()]
    path = make_tar(tmp_path / "a.tar", members, kind)
    with caplog.at_level(logging.INFO):
        source = open_source(path)
    assert source.names == sorted(files) and read(source) == files
    assert caplog.messages == [f"{path}: left out 1 files of formats that are not read (1 .svg)"]
    with source.open(source.names.index("part0/img000.png")) as stream:
        content = files["part0/img000.png"]
        assert (stream.seek(-9, 2), stream.read(99), stream.seek(3), stream.read(5)) == (
            len(content) - 9, content[-9:], 3, content[3:8])  # fmt: skip


def data(root, **changes):
    fields = dict(name="folder", root_dir=str(root), img_size=SIZE[0], img_width=SIZE[1], channels=3, on_error="raise",
                  split="published", val_ratio=0.3, in_memory="never", memory_gb=1.0)  # fmt: skip
    return SimpleNamespace(**fields | changes)


def test_shards_train_as_their_folder_does(tmp_path):
    files = example_files(9)
    folder = make_folder(tmp_path / "folder", files)
    (tmp_path / "shards").mkdir()
    for k in range(3):
        part = {name: files[name] for name in list(files)[k::3]}
        make_tar(tmp_path / "shards" / f"s-{k:03d}.tar", part | {"classes.txt": b"in each"})
    wanted = [open_dataset(data(folder), split) for split in ("train", "val")]
    order = list(zip(range(5), batches(wanted[0], 4, seed=3, seen=10)))
    for root in ("shards", "shards/*.tar", "shards/s-{000..002}.tar", "shards/s-00{2,0,1}.tar"):
        found = [open_dataset(data(tmp_path / root), split) for split in ("train", "val")]
        for ours, theirs in zip(found, wanted):
            assert [*map(ours.item_name, range(len(ours)))] == [*map(theirs.item_name, range(len(theirs)))]
            assert ours.fingerprint() == theirs.fingerprint()
    workers = zip(order, batches(found[0], 4, seed=3, seen=10, num_workers=2))
    assert all(torch.equal(batch, other) for (_, batch), other in workers)


def test_offsets_are_those_of_another_reader(tmp_path):
    """Archives of random members against tarfile's own list."""
    rng = random.Random(0)
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = []
        for i in range(60):
            depth = rng.choice([0, 3, 60 if kind != tarfile.USTAR_FORMAT else 20])
            name = "/".join([*["dir é"[: rng.randint(1, 5)]] * depth, f"{i}.png"])
            types = {"1": dict(linkname="0.png"), "2": dict(linkname="x" * rng.choice([1, 150 if depth > 20 else 9]))}
            special = {"type": (t := rng.choice("123456")).encode(), **types.get(t, {})}
            members.append((name, special if rng.random() < 0.4 else rng.randbytes(rng.choice([0, 1, 511, 512, 2000]))))
        path = make_tar(tmp_path / "r.tar", members, kind)
        with tarfile.open(path) as archive:
            wanted = {m.name: archive.extractfile(m).read() for m in archive if m.isreg()}
        assert read(open_source(path)) == wanted


def test_what_is_no_file_is_counted(tmp_path, caplog):
    image = encode(noise_image(0))
    others = [dict(type=b"2", linkname="/etc/passwd"), dict(type=b"1", linkname="a.png"), dict(type=b"3"),
              dict(type=b"6"), dict(type=b"Q"), dict(pax_headers={"GNU.sparse.major": "1"})]  # fmt: skip
    members = {"a.png": image, "b.txt": others[0], **{f"{i}.png": other for i, other in enumerate(others)}}
    path = make_tar(tmp_path / "a.tar", members)
    sparse = bytearray(tarfile.TarInfo("s.png").tobuf(tarfile.GNU_FORMAT))
    sparse[124:136], sparse[156:157], sparse[482] = b"%011o\0" % 512, b"S", 1
    sparse[148:156] = b"%06o\0 " % (sum(sparse) - sum(sparse[148:156]) + 256)
    path.write_bytes(bytes(sparse) + b"\1" * 512 + bytes(512) + b"\2" * 512 + path.read_bytes())
    source = open_source(path)
    assert read(source) == {"a.png": image}
    told = "2 sparse files, 1 symbolic links, 1 hard links, 1 devices, 1 pipes, 1 members of other kinds"
    assert caplog.messages == [f"{path}: left out images that are no files ({told})"]


def test_names_that_occur_again(tmp_path, caplog):
    again = [("a.png", b"old"), ("b.png", b"1"), ("a.png", b"new")]
    path = make_tar(tmp_path / "a.tar", again)
    assert read(open_source(path)) == {"a.png": b"new", "b.png": b"1"}
    assert caplog.messages == [f"{path}: left out 1 images that a later one of the same name replaces"]
    make_tar(tmp_path / "b.tar", {"b.png": b"2", "c.png": b"3"})
    assert read(open_source(tmp_path)) == {"a/a.png": b"new", "a/b.png": b"1", "b/b.png": b"2", "b/c.png": b"3"}
    for shard in "ab":  # as of the folders that unpacking each would make
        with tarfile.open(tmp_path / f"{shard}.tar") as archive:
            archive.extractall(tmp_path / "out" / shard, filter="data")
    assert FolderSource(tmp_path / "out").names == open_source(tmp_path / "{a,b}.tar").names


def test_a_sample_has_one_image(tmp_path, caplog):
    names = ("0.jpg", "0.mask.png", "0.png", "d.0/0.mask.png", "v/x.1.png", "v/x.2.png", "y.z.png")
    path = make_tar(tmp_path / "a.tar", dict.fromkeys(names, b"x"))
    assert open_source(path).names == ["0.jpg", "d.0/0.mask.png", "v/x.1.png", "v/x.2.png", "y.z.png"]
    assert caplog.messages == [f"{path}: left out 2 further images of samples that have one"]


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 8]) + content[at + 1 :]


def pax(body):
    header = tarfile.TarInfo("x")
    header.type, header.size = b"x", len(body)
    return header.tobuf() + body.ljust(512, b"\0")


FAULTS = {  # what is done to a good archive of two images, the second at byte 1024
    "gzip": (lambda tar: b"\x1f\x8b" + tar, "is compressed, .*after gzip -dk"),
    "zstd": (lambda tar: b"\x28\xb5\x2f\xfd" + tar, "zstd -dk"),
    "text": (lambda tar: b"no archive" * 99, "has no header of a tar archive at byte 0; accepted"),
    "empty": (lambda tar: b"", "cut short, at 0 bytes"),
    "header": (lambda tar: flip(tar, 1030), "no header of a tar archive at byte 1024"),
    "in data": (lambda tar: tar[:700], "cut short, at 700 of 1024 bytes or more"),
    "in header": (lambda tar: tar[:1200], "cut short, at 1200 bytes"),
    "at a border": (lambda tar: tar[:1024], "cut short, at 1024 bytes"),
    "joined": (lambda tar: tar + tar, "has more behind its end at byte 2048"),
    "negative": (lambda tar: pax(b"12 size=-99\n") + tar, "has the number b'-99'"),
    "huge": (lambda tar: pax(b"28 size=9223372036854775807\n"[:28]) + tar, "cut short"),
    "pax": (lambda tar: pax(b"99999 path=x\n") + tar, "broken pax header"),
    "pax lines": (lambda tar: pax(b"0 \n" * 50) + tar, "broken pax header"),
}  # fmt: skip


@pytest.mark.parametrize("damage, told", FAULTS.values(), ids=FAULTS)
def test_damaged_archives_are_refused(tmp_path, damage, told):
    good = make_tar(tmp_path / "a.tar", {"a.png": b"x" * 512, "b.png": b"y" * 512}).read_bytes()
    (tmp_path / "a.tar").write_bytes(damage(good))
    for root in (tmp_path, tmp_path / "a.tar", tmp_path / "*.tar"):
        with pytest.raises(ValueError, match=rf"^data\.root_dir: .*a\.tar .*{told}") as refused:
            open_source(root)
        assert "\n" not in str(refused.value)


def test_an_archive_that_changes_is_not_misread(tmp_path):
    path = make_tar(tmp_path / "a.tar", {"a.png": b"x" * 9000})
    source = open_source(path)
    stream = source.open(0)
    os.truncate(path, 5000)
    with pytest.raises(OSError, match="cut short"):
        stream.read()
    with pytest.raises(ValueError, match="has changed since it was opened"):
        stored_bytes(source, 0)


def test_patterns(tmp_path, monkeypatch):
    monkeypatch.setattr("data.tars._MOST_SHARDS", 99)

    def names(pattern):
        return [path.name for path in matching(tmp_path / pattern, "f")]

    assert names("s{8..11}") == ["s8", "s9", "s10", "s11"] and names("{03..1}") == ["03", "02", "01"]
    assert names("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"] and names("{000..1}") == ["000", "001"]
    for wrong, told in {"*.tar": "stands for no file", "{0..999999999}": "stands for too many files"}.items():
        with pytest.raises(ValueError, match=re.escape(f"f: {tmp_path / wrong} {told}; accepted")):
            matching(tmp_path / wrong, "f")
    make_tar(tmp_path / "s-0.tar", {"a.png": b""})
    with pytest.raises(ValueError, match=r"s-1\.tar cannot be read \(No such file"):
        open_source(tmp_path / "s-{0..1}.tar")
