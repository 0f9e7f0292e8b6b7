"""Folders, zips and LSUN databases of encoded images: the same pixels as Pillow's own, and readable refusals."""

import io
import logging
import multiprocessing
import os
import pickle
import re
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from data.decoding import decode_image
from data.images import ImageFiles
from data.lsun import LsunSource
from data.sources import FolderSource, open_source

SIZE = (12, 20)


def noise_image(seed, height=40, width=56, mode="RGB"):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(values)


def encode(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def example_files(count=6):
    return {f"part{i % 2}/img{i:03d}.png": encode(noise_image(i)) for i in range(count)}


def make_folder(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def make_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_tar(path, files, kind=tarfile.PAX_FORMAT):
    """files: name -> content, or what differs from a regular file; or pairs of them."""
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            changes = {"size": len(content)} if isinstance(content, bytes) else content
            for field, value in changes.items():
                setattr(member, field, value)
            archive.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def open_all(path, size=SIZE, channels=3, **options):
    source = open_source(path)
    return ImageFiles("folder", source, range(len(source.names)), size, channels, **options)


def all_items(dataset):
    return torch.stack([dataset[i] for i in range(len(dataset))])


@pytest.mark.parametrize("in_memory", ["always", "never"])
def test_folder_and_zip_hold_the_same_images(tmp_path, in_memory):
    files = example_files()
    junk = {"notes.txt": b"x", ".hidden.png": b"x", "__MACOSX/part0/._img000.png": b"x", ".thumbs/a.png": b"x"}
    folder = open_all(make_folder(tmp_path / "images", files | junk), in_memory=in_memory)
    archive = open_all(make_zip(tmp_path / "images.zip", files | junk), in_memory=in_memory)
    assert len(folder) == len(archive) == 6
    assert [folder.item_name(i) for i in range(6)] == [archive.item_name(i) for i in range(6)] == sorted(files)
    assert torch.equal(all_items(folder), all_items(archive))
    assert (folder.pixels is not None) == (in_memory == "always")
    with pytest.raises(IndexError):
        folder[6]


@pytest.mark.parametrize(
    "size, box",
    [
        (SIZE, (0, 3, 56, 37)),  # 56 x 40 (W x H) cut to the ratio 20:12 is 56 x 34 rows, centred
        ((16, 16), (8, 0, 48, 40)),
        ((40, 8), (24, 0, 32, 40)),
        ((7, 5), (13, 0, 42, 40)),
    ],
)
def test_resize_is_a_central_crop_and_lanczos(size, box):
    image = noise_image(1)
    wanted = image.crop(box).resize(size[::-1], Image.Resampling.LANCZOS)
    found = decode_image(encode(image), size, 3)
    assert found.dtype == torch.uint8 and found.shape == (3, *size)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(wanted))


def test_no_resampling_at_the_own_size():
    image = noise_image(2, *SIZE)
    assert np.array_equal(decode_image(encode(image), SIZE, 3).permute(1, 2, 0).numpy(), np.asarray(image))


@pytest.mark.parametrize(
    "kind, options, tolerance",
    [
        ("JPEG", {"quality": 95}, 12),
        ("WEBP", {"lossless": True}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("GIF", {}, 40),
    ],
)
def test_formats(kind, options, tolerance):
    ramp = np.stack(np.broadcast_arrays(np.arange(40)[:, None] * 6, np.arange(56) * 4, 90), -1).astype(np.uint8)
    found = decode_image(encode(Image.fromarray(ramp), kind, **options), (40, 56), 3).permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - ramp).max() <= tolerance


def test_grey_and_alpha_conversions():
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., :3], rgba[:4, :, 3], rgba[4:, :, 3] = (200, 100, 50), 255, 0  # upper half opaque, lower half clear
    encoded = encode(Image.fromarray(rgba))
    rgb, grey, four = (decode_image(encoded, (8, 8), c) for c in (3, 1, 4))
    assert (rgb[:, :4] == torch.tensor([200, 100, 50])[:, None, None]).all() and (rgb[:, 4:] == 255).all()
    assert grey.shape == (1, 8, 8) and (grey[:, :4] == round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)).all()
    assert np.array_equal(four.permute(1, 2, 0).numpy(), rgba)
    opaque = decode_image(encode(noise_image(0)), SIZE, 4)
    assert (opaque[3] == 255).all() and torch.equal(opaque[:3], decode_image(encode(noise_image(0)), SIZE, 3))
    spread = decode_image(encode(noise_image(0, mode="L")), SIZE, 3)
    assert torch.equal(spread[0], spread[1]) and torch.equal(spread[0], spread[2])


def test_sixteen_bit_grey_keeps_its_range():
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    found = decode_image(encode(Image.fromarray(values)), (8, 8), 1)[0].numpy()
    assert np.array_equal(found, np.round(values / 257).astype(np.uint8))


def test_palette_with_a_transparent_colour_is_shown_over_white():
    image = noise_image(0, 8, 8, "L").point(lambda v: v // 128).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60] + [0] * 762)
    found = decode_image(encode(image, transparency=1), (8, 8), 3)
    clear = torch.from_numpy(np.array(image) == 1)
    assert (found[:, clear] == 255).all() and (found[:, ~clear] == torch.tensor([[10], [20], [30]])).all()


@pytest.mark.parametrize(
    "kind, options", [("TIFF", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100}), ("PNG", {})]
)
def test_camera_orientation_is_applied(tmp_path, kind, options):
    ramp = np.stack(np.broadcast_arrays(np.arange(24)[:, None] * 10, np.arange(60) * 4, 90), -1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to show
    encoded = encode(Image.fromarray(ramp), kind, exif=exif, **options)
    found = decode_image(encoded, (60, 24), 3).permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - np.rot90(ramp, -1)).max() <= (12 if kind == "JPEG" else 0)
    folder = make_folder(tmp_path, {f"a.{kind.lower()}": encoded})
    if kind != "PNG":  # of which the header is not asked: cameras do not write them
        assert len(open_all(folder, size=(60, 24))) == 1
        with pytest.raises(ValueError, match="is 60x24"):
            open_all(folder, size=(24, 60))


@pytest.mark.parametrize("in_memory", ["always", "never"])
@pytest.mark.parametrize("container", ["folder", "zip"])
def test_damaged_pixels(tmp_path, caplog, in_memory, container):
    files = example_files()
    for bad in ("part0/img002.png", "part1/img005.png"):  # places 1 and 5 of 6 in sorted order
        files[bad] = files[bad][: len(files[bad]) // 2]
    path = make_folder(tmp_path / "d", files) if container == "folder" else make_zip(tmp_path / "d.zip", files)
    with pytest.raises(ValueError, match=r"^data\.root_dir: .*part0/img002\.png cannot be decoded") as caught:
        all_items(open_all(path, in_memory=in_memory))
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        dataset = open_all(path, in_memory=in_memory, on_error="skip")
        items = all_items(dataset)
        all_items(dataset)
    assert sum("img002.png" in message for message in caplog.messages) == 1
    assert len(dataset) == 6
    assert torch.equal(items[1], items[2]) and torch.equal(items[5], items[0])  # the next good one, cyclically
    assert torch.equal(items[4], decode_image(files["part1/img003.png"], SIZE, 3))


@pytest.mark.parametrize("in_memory", ["always", "never"])
def test_bad_headers(tmp_path, caplog, in_memory):
    files = example_files(4) | {
        "a_text.png": b"no image",
        "b_empty.jpg": b"",
        "c_small.png": encode(noise_image(0, 11, 99)),
        "d_narrow.png": encode(noise_image(0, 99, 19)),
    }
    path = make_folder(tmp_path, files)
    with pytest.raises(ValueError, match=r"a_text\.png cannot be read .* and 3 more of 8 images; data\.on_error=skip"):
        open_all(path, in_memory=in_memory)
    with caplog.at_level(logging.WARNING):
        dataset = open_all(path, in_memory=in_memory, on_error="skip")
    assert [dataset.item_name(i) for i in range(len(dataset))] == sorted(example_files(4))
    assert sum("left out" in message for message in caplog.messages) == 4
    assert any("c_small.png, which is 11x99 (HxW), needed is at least 12x20" in message for message in caplog.messages)


def test_zip_with_a_wrong_checksum(tmp_path):
    path = make_zip(tmp_path / "d.zip", example_files())
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 300] ^= 255  # a pixel of the first image
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"part0/img000\.png"):
        open_all(path)
    assert len(open_all(path, on_error="skip")) == 6


def test_nothing_usable(tmp_path):
    small = make_folder(tmp_path / "small", {"a.png": encode(noise_image(0, 4, 4))})
    with pytest.raises(ValueError, match=r"no usable image.*a\.png is 4x4"):
        open_all(small, on_error="skip")
    broken = make_folder(tmp_path / "broken", {"a.png": encode(noise_image(0))[:900]})
    with pytest.raises(ValueError, match="none of 1 images can be decoded"):
        open_all(broken, on_error="skip")


def test_missing_and_empty_places(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_bytes(b"not an archive")
    make_zip(tmp_path / "none.zip", {"readme.txt": b""})
    for path, message in (
        ("", "data.root_dir: empty"),
        (tmp_path / "nowhere", "nowhere does not exist; accepted:"),
        (tmp_path / "empty", "no images in .*empty; accepted: files ending in .bmp"),
        (tmp_path / "none.zip", "no images in"),
        (tmp_path / "text.zip", "text.zip is not a readable zip archive"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            open_source(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"channels": 2}, "data.channels is 2; accepted: 1 (grey), 3 (RGB), 4 (RGB and alpha)"),
        ({"size": (0, 5)}, "data.img_size, data.img_width are (0, 5); accepted: positive (H, W)"),
        ({"on_error": "ignore"}, "data.on_error is 'ignore'; accepted: raise, skip"),
        ({"in_memory": "yes"}, "data.in_memory is 'yes'; accepted: auto, always, never"),
    ],
)
def test_bad_options(tmp_path, options, message):
    path = make_folder(tmp_path, example_files(1))
    with pytest.raises(ValueError, match=re.escape(message)):
        open_all(path, **options)


def test_memory_limit(tmp_path):
    path = make_folder(tmp_path, example_files(4))
    needed = 4 * 3 * 12 * 20 / 1e9
    assert open_all(path, memory_gb=needed).pixels is not None
    assert open_all(path, memory_gb=0.99 * needed).pixels is None


def test_linked_folders_are_followed_once(tmp_path):
    root = make_folder(tmp_path / "root", example_files(2))
    make_folder(tmp_path / "other", {"z.png": encode(noise_image(9))})
    os.symlink(tmp_path / "other", root / "link")
    os.symlink(root, root / "cycle")
    assert FolderSource(root).names == ["link/z.png", "part0/img000.png", "part1/img001.png"]


def test_fingerprint(tmp_path):
    files = example_files()
    path = make_zip(tmp_path / "a.zip", files)
    print_of = open_all(path).fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", print_of)
    moved = path.rename(tmp_path / "b.zip")
    assert open_all(moved, in_memory="never").fingerprint() == print_of  # neither place nor memory matters
    renamed = {name.replace("000", "00a"): content for name, content in files.items()}
    changed = files | {"part0/img000.png": encode(noise_image(77))}
    others = [
        open_all(moved, size=(10, 20)),
        open_all(moved, channels=1),
        open_all(moved, split="train"),
        open_all(make_zip(tmp_path / "c.zip", renamed)),
        open_all(make_zip(tmp_path / "d.zip", changed)),
    ]
    assert len({print_of, *(d.fingerprint() for d in others)}) == 6
    folder = make_folder(tmp_path / "folder", files)
    before = open_all(folder).fingerprint()
    assert open_all(folder).fingerprint() == before
    os.utime(folder / "part0/img000.png", ns=(1, 1))
    tar = make_tar(tmp_path / "a.tar", files)
    assert open_all(folder, on_error="skip").fingerprint() == open_all(tar).fingerprint() == before
    content = bytearray(files["part0/img000.png"])
    content[-20] ^= 1  # of the same size
    (folder / "part0/img000.png").write_bytes(content)
    assert open_all(folder, in_memory="never").fingerprint() != before


def make_lmdb(path, files):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
        for name, content in files.items():
            transaction.put(name.encode(), content)
    return path


def read_in_child(source, queue):
    queue.put(b"".join(source.open(i).read() for i in range(len(source.names))))


@pytest.mark.parametrize("kind", ["zip", "lmdb", "tar"])
@pytest.mark.parametrize("method", ["fork", "pickle"])
def test_sources_work_in_other_processes(tmp_path, kind, method):
    files = example_files()
    if kind == "lmdb":
        source = LsunSource(make_lmdb(tmp_path / "a.lmdb", files))
    else:
        source = open_source({"zip": make_zip, "tar": make_tar}[kind](tmp_path / f"a.{kind}", files))
    wanted = b"".join(source.open(i).read() for i in range(6))  # opened in the parent, then used in the child
    assert wanted == b"".join(files[name] for name in sorted(files))
    if method == "pickle":
        twin = pickle.loads(pickle.dumps(source))
        assert twin.names == source.names and twin.open(3).read() == source.open(3).read()
        return
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(source, queue))
    child.start()
    assert queue.get(timeout=20) == wanted
    child.join()
    assert b"".join(source.open(i).read() for i in range(6)) == wanted


def test_lsun_database(tmp_path):
    files = {f"{i:02x}": encode(noise_image(i), "WEBP", lossless=True) for i in (200, 3, 90)}
    source = LsunSource(make_lmdb(tmp_path / "lmdb", files))
    assert source.names == ["03", "5a", "c8"]
    dataset = ImageFiles("churches", source, range(3), SIZE, 3, in_memory="never")
    assert torch.equal(dataset[1], decode_image(encode(noise_image(90)), SIZE, 3))
    again = LsunSource(tmp_path / "lmdb")  # a second reader in this process
    assert ImageFiles("churches", again, range(3), SIZE, 3).fingerprint() == dataset.fingerprint()


def test_lsun_faults(tmp_path, monkeypatch):
    empty = make_lmdb(tmp_path / "empty", {})
    with pytest.raises(ValueError, match=r"data\.root_dir: the LMDB .*empty holds no images"):
        LsunSource(empty)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "data.mdb").write_bytes(b"x" * 10000)
    with pytest.raises(ValueError, match="broken is not a readable LMDB"):
        LsunSource(tmp_path / "broken")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match="pip install lmdb"):
        LsunSource(tmp_path / "elsewhere")
