"""What data/prepare.py makes: images of one size in a zip or in tar archives, whole or not at all, and its check."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from tqdm import tqdm

from configs.validate import ConfigError, one_line
from data.images import ImageFiles
from data.loader import from_workers
from data.names import is_image_name
from data.opening import read_json
from data.pixels import to_pictures
from data.sources import ImageSource, open_source, stored_bytes
from data.tars import tars_in
from runtime.files import file_digest, present, sweep, write_atomic, write_json
from runtime.lock import FolderLock

_ACCEPTED = "the description of prepared images"


@dataclass(frozen=True)
class Prepared:
    """What is made: a zip, with its description beside it, or a folder of shards, with the description in it."""

    out: Path

    @property
    def zipped(self) -> bool:
        return self.out.suffix == ".zip"

    @property
    def description(self) -> Path:
        return self.out.with_name(f"{self.out.name}.json") if self.zipped else self.out / "prepared.json"

    def read(self) -> dict[str, Any]:
        """The description; ValueError where it is none."""
        content = read_json(self.description, dict, _ACCEPTED)
        files = content.get("files")
        if not isinstance(files, list) or not all(
            isinstance(file, dict) and isinstance(file.get("images"), dict) for file in files
        ):
            raise ValueError(f"{self.description}: lacks files with their images; accepted: {_ACCEPTED}")
        return content

    def files(self, description: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Each file with what the description says of it."""
        for file in description["files"]:
            yield self.out if self.zipped else self.out / Path(str(file.get("file"))).name, file


@dataclass(frozen=True)
class Work(Dataset):
    """What is to be made. Item k writes shard k; it is the number of its images, or the ValueError that stops it."""

    images: ImageFiles
    source: str
    left_out: list[str]
    result: Prepared
    shard_size: int
    settings: dict[str, Any]
    on_error: str
    processes: int

    @property
    def parts(self) -> Path:
        return self.result.out.with_name(f"{self.result.out.name}.parts")

    def shard(self, k: int) -> Path:
        return self.parts / "shards" / f"shard-{k:06d}.tar"

    def record(self, k: int) -> Path:
        """The file that says what is in shard k, once it is whole."""
        return self.parts / f"shard-{k:06d}.json"

    def __len__(self) -> int:
        return -(-len(self.images) // self.shard_size)

    def numbers(self, k: int) -> range:
        return range(k * self.shard_size, min((k + 1) * self.shard_size, len(self.images)))

    def __getitem__(self, k: int) -> int | ValueError:
        digests: dict[str, str] = {}
        damaged: list[str] = []

        def write(temporary: Path) -> None:
            with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
                for i in self.numbers(k):
                    try:
                        image = self.images.decoded(i)
                    except ValueError as error:
                        name = self.images.item_name(i)
                        if self.on_error == "raise":
                            raise ValueError(
                                f"--source: {name} {error}; --on_error=skip leaves such images out"
                            ) from None
                        damaged.append(name)
                        continue
                    stream = io.BytesIO()
                    to_pictures(image[None])[0].save(stream, "png")
                    member = tarfile.TarInfo(member_name(self.images.item_name(i)))
                    member.size = stream.tell()
                    digests[member.name] = hashlib.sha256(stream.getvalue()).hexdigest()
                    archive.addfile(member, io.BytesIO(stream.getvalue()))

        try:
            write_atomic(self.shard(k), write)
            write_json(self.record(k), {**_described(self.shard(k)), "images": digests, "left_out": damaged})
        except (ValueError, OSError) as error:
            return ValueError(one_line(error))
        return len(self.numbers(k))

    def check(self) -> bool:
        """Whether all is there already; ValueError where there is something else."""
        out, plan = self.result.out, self.parts / "plan.json"
        whole = present(out) and not (out.is_dir() and not any(out.iterdir()))
        if whole and not present(self.result.description):
            raise ValueError(f"--out is {out}, which was not made here; accepted: another place")
        if whole:
            there = self.result.read()
            if lost := [path for path, file in self.result.files(there) if not _is_there(path, file)]:
                raise ValueError(f"--out is {out}, where {lost[0]} is not as it was written; accepted: another place")
        elif present(self.parts) and any(not name.startswith(".") for name in os.listdir(self.parts)):
            there = read_json(plan, dict, "what is being made")
        else:
            if present(self.result.description):  # of a result that was removed; another file must stay
                self.result.read()
            return False
        before = there["settings"] if isinstance(there.get("settings"), dict) else {}
        if other := next((name for name, value in self.settings.items() if before.get(name) != value), None):
            raise ValueError(f"--out is {out}, made with another {other}; accepted: another place")
        return whole

    def make(self) -> None:
        """Make what is not there yet, until all is.

        Raises:
            ValueError: another command makes it, something else is there, or an image is damaged.
            OSError: when something cannot be written.
        """
        try:
            with FolderLock(self.parts):
                if not self.check():
                    self._make_shards()
                    self._finish()
                self._clear()
        finally:
            with contextlib.suppress(OSError):
                self.parts.rmdir()

    def _make_shards(self) -> None:
        write_json(self.parts / "plan.json", {"settings": self.settings})
        (self.parts / "shards").mkdir(exist_ok=True)
        for folder in (self.parts, self.parts / "shards"):
            sweep(folder)
        missing = [k for k in range(len(self)) if not _is_there(self.shard(k), self._recorded(k))]
        done = len(self.images) - sum(len(self.numbers(k)) for k in missing)
        with tqdm(total=len(self.images), initial=done, unit="image", disable=None) as bar:
            for count in from_workers(self, missing, self.processes if self.processes > 1 else 0):
                bar.update(count)

    def _recorded(self, k: int) -> dict[str, Any]:
        return read_json(self.record(k), dict, "what a shard holds") if present(self.record(k)) else {}

    def _finish(self) -> None:
        """Give the result its place, when its description has its own."""
        files = [self._recorded(k) for k in range(len(self))]
        left_out = sorted([*self.left_out, *(name for file in files for name in file.pop("left_out"))])
        shards, zipped = self.parts / "shards", self.parts / "zip"
        if self.result.zipped:
            write_atomic(zipped, self._write_zip)
            images = {name: digest for file in files for name, digest in file["images"].items()}
            files = [{**_described(zipped), "file": self.result.out.name, "images": images}]
        description = {"source": self.source, "settings": self.settings, "left_out": left_out, "files": files}
        write_json(
            self.result.description if self.result.zipped else shards / self.result.description.name, description
        )
        os.replace(zipped if self.result.zipped else shards, self.result.out)

    def _write_zip(self, temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w") as archive:
            for k in range(len(self)):
                with tarfile.open(self.shard(k)) as shard:
                    for member in shard:
                        info = zipfile.ZipInfo(member.name)  # of the year 1980: no clock changes the bytes
                        info.external_attr = 0o100644 << 16
                        content = shard.extractfile(member)
                        assert content is not None  # a shard holds files alone
                        archive.writestr(info, content.read())

    def _clear(self) -> None:
        """Remove what only an unfinished result needs."""
        for k in range(len(self)):
            for path in (self.shard(k), self.record(k)):
                path.unlink(missing_ok=True)
        (self.parts / "plan.json").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            (self.parts / "shards").rmdir()


def verify(result: Prepared) -> str:
    """Compare all files with the description; say what was compared.

    Raises:
        ValueError: naming what differs.
    """
    description, faults, count = result.read(), [], 0
    known = list(result.files(description))
    for path, file in tqdm(known, unit="file", disable=None, leave=False):
        count += len(file["images"])
        if not path.is_file():
            faults.append(f"{path} is not there")
        elif file_digest(path) != file.get("sha256"):
            faults.append(f"{path} is not as it was written{_which_images(path, file['images'])}")
    if not result.zipped:
        faults += [f"{path} was not made here" for path in tars_in(result.out) if path not in dict(known)]
    if faults:
        raise ConfigError([f"--out: {fault}; accepted: {result.out} as it was made" for fault in faults])
    return f"{result.out}: {len(known)} files with {count} images are as they were written"


def _which_images(path: Path, digests: dict[str, str]) -> str:
    """Which images of a damaged archive differ, if it can be opened."""
    with contextlib.suppress(ValueError):
        source = open_source(path)
        found = {name: _digest(source, i) for i, name in enumerate(source.names)}
        if wrong := [name for name, digest in digests.items() if found.get(name) != digest]:
            return f" ({len(wrong)} of {len(digests)} images, such as {wrong[0]})"
    return ""


def _digest(source: ImageSource, i: int) -> str:
    try:
        return hashlib.sha256(stored_bytes(source, i)).hexdigest()
    except ValueError as error:
        return str(error)


def member_name(name: str) -> str:
    """What an image of a source is called in a result."""
    return name if is_image_name(name) else f"{name}.png"  # keys of databases have no endings


def _described(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_digest(path)}


def _is_there(path: Path, file: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == file.get("bytes")
