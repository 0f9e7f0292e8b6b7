"""Commands that are given files of the wrong kind: status 2, one line that names the file, nothing written, no wait."""

import os
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import forked
import micro


def small_png(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((16, 12, 3), np.uint8)).save(path)


def eps(place):
    place.mkdir()
    (place / "z.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EOF\n")


def pipe_in_folder(place):
    small_png(place / "a.png")
    os.mkfifo(place / "b.png")


def endless(place):
    small_png(place / "a.png")
    (place / "b.png").symlink_to("/dev/zero")


def bomb(place):
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.png", "w") as member:
        member.write(b"\x89PNG\r\n\x1a\n")
        member.write(bytes(1 << 20))


def cut_shard(place):
    place.mkdir()
    with tarfile.open(place / "s-0.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    os.truncate(place / "s-0.tar", 700)


def compressed_shard(place):
    place.mkdir()
    with tarfile.open(place / "s-0.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))


def directory_of_rubbish(place):
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr("a.png", b"x" * 100)
    content = bytearray(place.read_bytes())
    content[-40:-22] = b"\xff" * 18
    place.write_bytes(content)


def cut_database(place):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(place), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
        for i in range(20):
            transaction.put(b"%d" % i, os.urandom(9000))
    os.truncate(place / "data.mdb", 30_000)


def split(place):
    small_png(place / "00001.png")
    (place / "split.json").write_bytes(b"\xff[]")


FAULTS = {
    "folder": [(eps, "z.png"), (pipe_in_folder, "b.png"), (endless, "b.png"), (os.mkfifo, "named pipe"),
               (bomb, "a.png"), (directory_of_rubbish, "set"), (lambda place: place.write_bytes(b"\xff" * 99), "set"),
               (cut_shard, "s-0.tar is a tar cut short"), (compressed_shard, "s-0.tar.gz is compressed")],
    "churches": [(cut_database, "cut short")],
    "celeba": [(split, "split.json")],
    "fashion_mnist": [(os.mkfifo, "named pipe"), (lambda place: place.symlink_to("/dev/zero"), "a device"),
                      (bomb, "set")],
}  # fmt: skip


@pytest.mark.parametrize("name, make, told", [(name, *fault) for name, faults in FAULTS.items() for fault in faults])
def test_training_refuses_bad_data(tmp_path, name, make, told):
    make(tmp_path / "set")
    fields = {**micro.IMAGE, "run.root_dir": tmp_path / "runs", "data.name": name, "data.root_dir": tmp_path / "set"}
    given = ["--config=configs/tiny_config.py", *micro.arguments("config", fields)]
    done = forked.run(["train_inf_ae_diffusion.py", *given], timeout=30)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "data.root_dir" in done.stderr and told in done.stderr, last
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "manifest, weights, told",
    [
        (b"[]", None, "manifest.json: holds an array; accepted: the manifest"),
        (b"{}", b"[" * 9, "w.pt: cannot be read"),
        (b"{}", "script", "is not that of a known TorchScript archive"),
    ],
)
def test_scoring_refuses_bad_files(tmp_path, manifest, weights, told):
    for i in range(3):
        small_png(tmp_path / "drawn" / f"{i:06d}.png")
    (tmp_path / "drawn" / "manifest.json").write_bytes(manifest)
    given = ["--model=random_features"]
    if weights is not None:
        given = ["--model=inception_v3" if weights == "script" else "--model=efficientnet_lite0",
                 f"--weights={tmp_path / 'w.pt'}"]  # fmt: skip
        if weights == "script":
            torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "w.pt"))
        else:
            (tmp_path / "w.pt").write_bytes(weights)
    folder = tmp_path / "drawn"
    done = forked.run(["experiments/calculate_fid.py", f"--samples={folder}", f"--reference={folder}", "--device=cpu",
                       f"--cache_dir={tmp_path / 'cache'}", *given], timeout=60)  # fmt: skip
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(folder.glob("fid_*"))
