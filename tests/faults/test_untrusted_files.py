"""Files from strangers: no code of theirs runs, no read waits or goes on for ever, and a cut file kills no process."""

import ast
import hashlib
import io
import json
import logging
import os
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from configs.schema import DataConfig
from data import opening, sources
from data.datasets import open_dataset
from data.decoding import read_image
from data.fashion_mnist import read_fashion_mnist
from data.images import ImageFiles
from data.lsun import LsunSource
from data.opening import read_at_most, read_json
from data.sources import open_source, stored_bytes
from experiments.support.inputs import read_mask
from experiments.support.results import Results
from experiments.support.run_log import log_lines
from metrics.images import ImageFolder, MollifiedSamples
from metrics.weights import load_script, read_state_dict
from models.operators import compiled

ROOT = Path(__file__).parents[2]


def png(size=(8, 8)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, "PNG")
    return stream.getvalue()


class Leaves(torch.nn.Module):
    """Its archive holds code that runs when it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        print("RUN")
        self.weight = state[0]
        self.training = state[1]

    def forward(self) -> torch.Tensor:
        return self.weight


HEADERS = ["[]", "null", "{", "[" * 50_000, '{"made_from": "a"}', '{"made_from": "a", "row": []}']


@pytest.mark.parametrize("text", HEADERS)
def test_a_picture_of_others_counts_as_missing(tmp_path, text):
    results = Results(tmp_path, {}, {})
    info = PngInfo()
    info.add_text("result", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    assert results.lacks("x", "a")


def test_torchscript_is_not_opened(tmp_path, capfd):
    path = tmp_path / "weights.pt"
    torch.jit.script(Leaves()).save(str(path))
    for read in (read_state_dict, load_script):
        with pytest.raises(ValueError, match=r"weights\.pt: its SHA-256 .* accepted: ViT-B-32\.pt"):
            read(path)
    assert "RUN" not in capfd.readouterr().out
    torch.jit.load(str(path))
    assert "RUN" in capfd.readouterr().out  # so the file would have run it


@pytest.mark.parametrize(
    "content", [[], None, {}, {1: torch.ones(1)}, {"a": 1}, {"state_dict": []}, {"state_dict": None}]
)
def test_weights_of_another_structure(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: holds no table of tensors; accepted: a state dict"):
        read_state_dict(tmp_path / "w.pt")


def test_every_image_is_opened_with_named_formats():
    """Pillow tries every decoder it knows otherwise; that of EPS starts Ghostscript."""
    found = 0
    for file in ROOT.rglob("*.py"):
        if "tests" in file.parts or ".venv" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open"):
                found += 1
                assert any(word.arg == "formats" for word in node.keywords), f"{file}:{node.lineno}"
    assert found > 3


def test_an_eps_by_another_name_starts_nothing(tmp_path, monkeypatch):
    script = tmp_path / "bin" / "gs"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "z.png").write_bytes(eps)
    with pytest.raises(ValueError, match="not an image of the formats BMP, GIF, JPEG"):
        read_image(eps, 3)
    with pytest.raises(ValueError, match=r"z\.png cannot be read"):
        ImageFiles("folder", open_source(tmp_path), [0], (8, 8), 3)
    with pytest.raises(ValueError, match="not an image of the formats"):
        read_mask(str(tmp_path / "z.png"), (8, 8), (8, 8))
    assert not (tmp_path / "started").exists()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize("make", [pipe, device, unix_socket, Path.mkdir])
def test_what_is_no_file_is_refused_by_its_kind(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    kind = {pipe: "a named pipe", device: "a device", unix_socket: "a socket", Path.mkdir: "a folder"}[make]
    make(Path("a.png"))
    with pytest.raises(ValueError, match=f"{kind}, not a file"):
        read_mask("a.png", (8, 8), (8, 8))
    with pytest.raises(ValueError, match=f"a.png: cannot be read .{kind}, not a file"):
        read_json("a.png", dict, "a manifest")
    if make is not Path.mkdir:
        for read in (open_source, read_fashion_mnist):
            with pytest.raises(ValueError, match=f"{kind}, not a file"):
                read(Path("a.png"))
        with pytest.raises(ValueError, match=f"a.png cannot be read .{kind}, not a file"):
            ImageFiles("folder", open_source("."), [0], (8, 8), 3)
    Path("raw").mkdir()
    make(Path("raw/000000.npy"))
    with pytest.raises(ValueError, match=f"000000.npy cannot be read .{kind}, not a file"):
        MollifiedSamples(".", None, 0.0, 3, None)[0]


def test_members_of_archives_are_bounded(tmp_path, monkeypatch):
    for module in (opening, sources):
        monkeypatch.setattr(module, "LARGEST", 1 << 16)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(1 << 20))
        archive.writestr("b.png", png())
    source = open_source(tmp_path / "a.zip")
    with pytest.raises(ValueError, match=r"cannot be read .1048576 bytes; accepted: at most 65536"):
        stored_bytes(source, 0)
    assert stored_bytes(source, 1) == png()
    with pytest.raises(OSError, match="more than 100 bytes"):
        read_at_most(open("/dev/zero", "rb"), 100)


def test_arrays_are_bounded(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 28, 28)})
    (tmp_path / "a.npz").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(100))
    with pytest.raises(ValueError, match=r"a\.npz cannot be read"):
        read_fashion_mnist(tmp_path / "a.npz")
    (tmp_path / "raw").mkdir()
    contents = {"claims more": header.getvalue() + bytes(100), "text": b"hello", "empty": b"", "pickle": b"\x80\x04N."}
    for content in contents.values():
        (tmp_path / "raw" / "000000.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"000000\.npy cannot be read .*accepted: whole files of floating-point"):
            MollifiedSamples(str(tmp_path), None, 0.0, 3, None)[0]
    for array in (np.zeros(3), np.zeros((3, 4, 4), np.int64), np.zeros((5, 4, 4)), np.zeros((2, 3, 4, 4))):
        np.save(tmp_path / "raw" / "000000.npy", array)
        with pytest.raises(ValueError, match=r"000000\.npy holds .*accepted: whole files of floating-point"):
            MollifiedSamples(str(tmp_path), None, 0.0, 3, None)[0]


def lmdb_of(folder: Path, count: int = 40) -> Path:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(folder), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for i in range(count):
            transaction.put(f"{i:04d}".encode(), os.urandom(9000))
    return folder / "data.mdb"


def test_a_cut_database_is_refused_before_it_is_mapped(tmp_path):
    whole = lmdb_of(tmp_path / "lmdb").read_bytes()
    for part in (0, 10, 100, 4096, 5000, 8192, 20000, len(whole) // 2, len(whole) - 4096):
        folder = tmp_path / str(part)
        folder.mkdir()
        (folder / "data.mdb").write_bytes(whole[:part])
        with pytest.raises(ValueError, match=r"is not a readable LMDB .it is cut short") as caught:
            LsunSource(folder)
        assert "\n" not in str(caught.value)
    assert len(LsunSource(tmp_path / "lmdb").names) == 40
    padded = tmp_path / "padded"
    padded.mkdir()
    (padded / "data.mdb").write_bytes(whole + bytes(8192))  # as large as its map, as some writers leave it
    assert len(LsunSource(padded).names) == 40


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    if compiled.library() is None:
        pytest.skip("needs a C compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.library.cache_clear()
    yield tmp_path / "infty-diff"
    compiled.library.cache_clear()


def test_a_damaged_library_is_built_anew(kernels, monkeypatch, caplog):
    assert compiled.library() is not None
    (kept,) = kernels.iterdir()
    content = kept.read_bytes()
    flipped = content[:9000] + bytes([content[9000] ^ 1]) + content[9001:]
    for i, bad in enumerate((content[:5000], flipped)):
        copy = kernels.parent / str(i) / "infty-diff" / kept.name  # never damage what is loaded here
        copy.parent.mkdir(parents=True)
        copy.write_bytes(bad)
        monkeypatch.setenv("XDG_CACHE_HOME", str(kernels.parent / str(i)))
        compiled.library.cache_clear()
        caplog.clear()
        assert compiled.library() is not None
        assert f"{copy} is damaged, and is built anew" in caplog.text
        (anew,) = copy.parent.iterdir()
        assert hashlib.sha256(anew.read_bytes()).hexdigest()[:24] in anew.name
        compiled.library.cache_clear()
        caplog.clear()
        assert compiled.library() is not None and not caplog.messages  # found whole


def test_a_cache_that_cannot_be_written_is_not_a_missing_compiler(kernels, caplog):
    kernels.write_text("a file where the folder would be")
    with caplog.at_level(logging.INFO):
        assert compiled.library() is not None
    assert "kept for this process alone" in caplog.text and "compiler" not in caplog.text


def test_a_missing_compiler_is_said(kernels, monkeypatch, caplog):
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert compiled.library() is None
    assert "cannot be built, using slower ones: " in caplog.text and "/nowhere/cc" in caplog.text


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no JSON"),
        (b"[]", "holds an array"),
        (b"null", "holds null"),
        (b"3", "holds a number"),
        (b'"a"', "holds text"),
        (b"true", "holds true or false"),
        (b"{", "holds no JSON"),
        (b"[" * 100_000, "holds no JSON"),
        (b"1" * 5000, "holds no JSON"),
        (b'{"a": "\xff"}', "holds no JSON"),
    ],
)
def test_json_of_another_structure(tmp_path, content, message):
    """Wherever the project reads JSON: one line that names the file and what it should hold."""
    (tmp_path / "samples").mkdir()
    places = {
        "a.json": lambda: read_json(tmp_path / "a.json", dict, "an object"),
        "split.json": lambda: open_dataset(DataConfig(name="celeba", root_dir=str(tmp_path), img_size=8), "train"),
        "metrics.jsonl": lambda: log_lines(tmp_path),
        "samples/manifest.json": lambda: ImageFolder(str(tmp_path / "samples"), 3, "--samples"),
    }
    for name in ("00001.png", "samples/000001.png"):
        (tmp_path / name).write_bytes(png())
    for name, read in places.items():
        (tmp_path / name).write_bytes(content or b"\n")
        with pytest.raises(ValueError, match=rf"{name}(, line 1)?: {message}.*; accepted: ") as caught:
            read()
        assert "\n" not in str(caught.value)
    (tmp_path / "a.json").write_text(json.dumps({"a": 1}))
    assert read_json(tmp_path / "a.json", dict, "an object") == {"a": 1}
