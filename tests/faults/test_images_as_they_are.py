"""Samples of more than 8 bits, pages, masks, mixed sizes: nothing is changed, or taken for something else, unsaid."""

import io
import logging
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data.decoding import read_image
from data.images import ImageFiles
from data.sources import open_source
from data.wrapped import WrappedImages
from experiments.support.inputs import open_inputs, read_mask
from metrics.images import ImageFolder

H, W = 7, 5


def png(samples: np.ndarray, bits: int = 16) -> bytes:
    """A PNG of (H, W, 1 … 4) samples, written by hand."""
    height, width, bands = samples.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[bands]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">2I5B", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(samples: np.ndarray, *, order: str = "<", more: dict[int, int] | None = None) -> bytes:
    """A TIFF of (H, W, 1 or 3) samples of 16 bits, written by hand; `more`: further tags."""
    height, width, bands = samples.shape
    pixels = samples.astype(f"{order}u2").tobytes()
    pixels = zlib.compress(pixels) if more and more.get(259) == 8 else pixels
    tags = {256: width, 257: height, 258: 16, 259: 1, 262: 1 if bands == 1 else 2, 273: 0, 277: bands, 278: height,
            279: len(pixels), **(more or {})}  # fmt: skip
    start = 8 + 2 + 12 * len(tags) + 4
    tags[273] = start + 8
    entries = b""
    for tag, value in sorted(tags.items()):
        if tag == 258 and bands == 3:
            entries += struct.pack(f"{order}HHII", tag, 3, 3, start)
        else:
            entries += struct.pack(f"{order}HHII", tag, 4, 1, value)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(f"{order}IH", 8, len(tags)) + entries + struct.pack(f"{order}I", 0)
    return head + struct.pack(f"{order}4H", 16, 16, 16, 0) + pixels


def pgm(samples: np.ndarray, white: int = 65535) -> bytes:
    height, width, bands = samples.shape
    kind = b"P5" if bands == 1 else b"P6"
    return kind + f"\n{width} {height}\n{white}\n".encode() + samples.astype(">u2").tobytes()


def plain_pgm(samples: np.ndarray, white: int = 65535) -> bytes:
    height, width, bands = samples.shape
    values = " ".join(map(str, samples.ravel()))
    return f"P{2 if bands == 1 else 3}\n{width} {height}\n{white}\n{values}\n".encode()


def saved_tiff(samples: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(samples[..., 0].astype(np.uint16)).save(stream, "TIFF", compression="tiff_adobe_deflate")
    return stream.getvalue()


def samples(bands: int, most: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, most + 1, (H, W, bands))
    values[0, 0] = most
    return values


def to_8bit(values: np.ndarray, white: int) -> np.ndarray:
    return np.floor(values * 255 / white + 0.5).astype(np.uint8)


CONTAINERS = {"png": png, "tiff": tiff, "tiff, other order": lambda x: tiff(x, order=">"), "pgm": pgm,
              "plain pgm": plain_pgm}  # fmt: skip


@pytest.mark.parametrize("most, white", [(4095, 4095), (900, 1023), (60000, 65535), (200, 255), (0, 255)])
@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("container", CONTAINERS)
def test_samples_of_16_bits_are_equal_in_every_container(container, bands, most, white):
    values = samples(bands, most)
    found = np.asarray(read_image(CONTAINERS[container](values), bands)).reshape(H, W, bands)
    assert np.array_equal(found, to_8bit(values, white))


def test_compressed_and_inverted_tiffs():
    values = samples(1, 4095)
    assert np.array_equal(np.asarray(read_image(saved_tiff(values), 1)), to_8bit(values, 4095)[..., 0])
    inverted = read_image(tiff(values, more={262: 0}), 1)
    assert np.array_equal(np.asarray(inverted), to_8bit(4095 - values, 4095)[..., 0])


@pytest.mark.parametrize("order", "<>")
def test_compressed_tiffs_of_several_bands(order):
    """These are decoded by libtiff, which gives samples in the order of bytes of the machine."""
    values = samples(3, 4095)
    found = read_image(tiff(values, order=order, more={259: 8}), 3)
    assert np.array_equal(np.asarray(found), to_8bit(values, 4095))


@pytest.mark.parametrize("bands", [1, 3])
def test_a_transparent_colour_of_16_bits(bands):
    """A PNG may name a colour that is transparent, to the last bit."""
    values = samples(bands, 4000)
    values[1, 1], values[2, 2] = 3000, 3001
    encoded = png(values)
    chunk = b"tRNS" + struct.pack(">H", 3000) * bands
    at = encoded.index(b"IDAT") - 4
    chunk = struct.pack(">I", 2 * bands) + chunk + struct.pack(">I", zlib.crc32(chunk))
    found = np.asarray(read_image(encoded[:at] + chunk + encoded[at:], 4))
    assert np.array_equal(found[..., 3] == 0, (values == 3000).all(axis=2))
    assert found[2, 2, 3] == 255 and np.array_equal(found[..., 0], to_8bit(values, 4095)[..., 0])


def test_separate_planes_are_refused():
    with pytest.raises(ValueError, match="more than 8 bits a sample in separate planes"):
        read_image(tiff(samples(3, 4095), more={284: 2}), 3)


def test_a_stated_white_counts():
    values = samples(1, 900)
    for encoded in (pgm(values, 4095), plain_pgm(values, 4095), tiff(values, more={281: 4095})):
        assert np.array_equal(np.asarray(read_image(encoded, 1)), to_8bit(values, 4095)[..., 0])


@pytest.mark.parametrize("bands", [2, 4])
def test_opacity_of_16_bits(bands):
    values = samples(bands, 4095)
    values[..., -1] = np.where(np.arange(W) < 2, 0, 65535)
    found = np.asarray(read_image(png(values), 4))
    assert np.array_equal(found[..., 3], np.where(np.arange(W) < 2, 0, 255) * np.ones((H, 1)))
    wanted = to_8bit(values[..., :-1], 4095)
    assert np.array_equal(found[..., :3], np.broadcast_to(wanted, (H, W, 3)))


def test_what_has_no_known_white_is_refused_for_the_true_reason():
    stream = io.BytesIO()
    Image.fromarray(np.ones((H, W), np.float32)).save(stream, "TIFF")
    with pytest.raises(ValueError, match="floating-point samples"):
        read_image(stream.getvalue(), 1)
    for values in (np.full((H, W), -3, np.int32), np.full((H, W), 1 << 20, np.int32)):
        stream = io.BytesIO()
        Image.fromarray(values).save(stream, "TIFF")
        with pytest.raises(ValueError, match="accepted: 0 to 65535"):
            read_image(stream.getvalue(), 1)


def test_a_folder_has_one_white_and_says_it(tmp_path, caplog):
    dark, bright = samples(1, 700, 1), samples(1, 4000, 2)
    (tmp_path / "a.png").write_bytes(png(dark))
    (tmp_path / "b.tif").write_bytes(tiff(bright))
    source = open_source(tmp_path)
    with caplog.at_level(logging.INFO):
        whole = ImageFiles("folder", source, [0, 1], (H, W), 1)
        part = ImageFiles("folder", source, [0], (H, W), 1, in_memory="never")  # a split without the bright one
    assert np.array_equal(whole[0][0].numpy(), to_8bit(dark, 4095)[..., 0])
    assert np.array_equal(whole[1][0].numpy(), to_8bit(bright, 4095)[..., 0])
    assert torch.equal(part[0], whole[0])
    assert sum("white is 4095, as measured" in line for line in caplog.messages) == 2  # once for each set
    scored = ImageFolder(str(tmp_path), 1, "--samples")
    assert np.array_equal(scored[0], whole[0].permute(1, 2, 0).numpy())
    items = [Image.fromarray(x[..., 0].astype(np.uint16)) for x in (dark, bright)]
    assert torch.equal(WrappedImages(items, channels=1)[0], whole[0])


def test_several_pages_are_said(tmp_path, caplog):
    pages = [Image.fromarray(np.full((H, W), value, np.uint8)) for value in (10, 200)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "b.gif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "c.png")
    with caplog.at_level(logging.WARNING):
        images = ImageFiles("folder", open_source(tmp_path), range(3), (H, W), 1)
    assert images[0].unique().tolist() == [10]
    assert caplog.messages == [f"{tmp_path}: a.tif and 1 more images have several pages, of which the first alone is "
                               "used"]  # fmt: skip
    caplog.clear()
    ImageFolder(str(tmp_path), 1, "--samples")[1]
    assert "b.gif has several pages" in caplog.text


def test_other_formats_beside_the_images_are_counted(tmp_path, caplog):
    for name in ("a.png", "b.heic", "c.heic", "d.avif", "split.json", "readme.txt", ".hidden.heic"):
        (tmp_path / name).write_bytes(b"")
    with caplog.at_level(logging.INFO):
        open_source(tmp_path)
    assert caplog.messages == [f"{tmp_path}: left out 3 files of formats that are not read (2 .heic, 1 .avif)"]


def disc(shape: tuple[int, int] = (48, 60)) -> np.ndarray:
    y, x = np.ogrid[: shape[0], : shape[1]]
    return (y - 20) ** 2 + (x - 30) ** 2 < 144


def known(path, image: Image.Image, **options) -> torch.Tensor:
    image.save(path, **options)
    return read_mask(str(path), image.size[::-1], image.size[::-1])


def test_a_mask_is_white_in_its_hole_also_after_compression(tmp_path):
    image = Image.fromarray(disc().astype(np.uint8) * 255)
    assert np.array_equal(known(tmp_path / "m.png", image), ~disc())
    for quality in (90, 50, 20):
        found = known(tmp_path / "m.jpg", image.convert("RGB"), quality=quality)
        assert (found.numpy() == ~disc()).mean() > 0.98
    smooth = image.resize((30, 24), Image.Resampling.LANCZOS)
    known(tmp_path / "s.png", smooth)
    deep = Image.fromarray(disc().astype(np.uint16) * 65535)
    assert np.array_equal(known(tmp_path / "d.png", deep), ~disc())
    assert np.array_equal(known(tmp_path / "b.png", image.convert("1")), ~disc())


def test_a_mask_whose_opacity_varies_has_its_hole_where_it_is_transparent(tmp_path):
    photograph = np.random.default_rng(0).integers(0, 256, (48, 60, 3), np.uint8)
    hole = np.where(disc(), 0, 255).astype(np.uint8)
    assert np.array_equal(known(tmp_path / "a.png", Image.fromarray(np.dstack([photograph, hole]))), ~disc())
    grey = Image.fromarray(np.dstack([np.zeros_like(hole), hole]))
    assert np.array_equal(known(tmp_path / "b.png", grey), ~disc())
    colours = np.repeat(255 - hole[..., None], 3, axis=2)  # white in the hole, and of one opacity
    for opacity in (255, 128, 0):
        image = Image.fromarray(np.dstack([colours, np.full_like(hole, opacity)]))
        assert np.array_equal(known(tmp_path / "c.png", image), ~disc())


def test_pictures_are_no_masks(tmp_path):
    rng = np.random.default_rng(0)
    ramp = np.broadcast_to(np.linspace(0, 255, 60), (48, 60)).astype(np.uint8)
    night = (40 * rng.random((48, 60))).astype(np.uint8)
    night[10:20, 10:20] = 120
    pictures = {
        "ramp": ramp,
        "noise": rng.integers(0, 256, (48, 60), np.uint8),
        "night": night,
        "colours": rng.integers(0, 256, (48, 60, 3), np.uint8),
        "grey": np.full((48, 60), 128, np.uint8),
        "red hole": np.where(disc()[..., None], np.array([255, 0, 0]), 0).astype(np.uint8),
    }
    for name, pixels in pictures.items():
        with pytest.raises(ValueError, match="neither black nor white; accepted: an image, white in the hole"):
            known(tmp_path / f"{name}.png", Image.fromarray(pixels))


def test_mixed_sizes_are_counted(tmp_path):
    for i, size in enumerate([(H, W), (H, W), (9, 4)]):
        Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / f"{i}.png")
    assert ImageFolder(str(tmp_path), 1, "--samples").sizes() == {(H, W): 2, (9, 4): 1}


def test_inputs_of_16_bits(tmp_path):
    from configs.schema import DataConfig

    values = samples(1, 4095)
    (tmp_path / "a.png").write_bytes(png(values))
    data = DataConfig(**{"name": "folder", "root_dir": "", "img_size": H, "channels": 1})
    found = open_inputs(str(tmp_path / "a.png"), data, (H, W), 1).images[0, 0]
    assert torch.equal(((found + 1) * 127.5).round().byte(), torch.from_numpy(to_8bit(values, 4095)[..., 0]))
