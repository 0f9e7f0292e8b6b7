"""Crop and resize images once, in parallel, for training at that size: into a zip, or into tar archives (shards).

    python data/prepare.py --source=PATH --out=faces-64.zip --size=64
    python data/prepare.py --source=PATH --out=faces-64x96 --size=64x96 --shard_size=10000
    python data/prepare.py --out=faces-64.zip --verify

The source is a folder, a zip, a tar, a folder or pattern of tars, or an LMDB. Each image becomes a PNG of the pixels
that training at this size and with these channels sees. It keeps its name, with its ending, since the order and the
split of a data set follow from names. --out is a zip if it ends in .zip, else a folder of shards; data.root_dir takes
either.

The result appears when it is whole. Until then its parts are in NAME.parts, and the same command goes on where it was.
It has the same bytes whatever the number of processes. NAME.zip.json, or prepared.json in the folder, says what was
made, with the SHA-256 of every file and every image. --verify compares them.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the modules beside this one would stand in the place of packages of their names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

from absl import flags

from configs.validate import ConfigError
from data.base import CHANNELS
from data.images import ERROR_MODES, ImageFiles
from data.lsun import LsunSource, is_lmdb
from data.prepared import Prepared, Work, member_name, verify
from data.sources import existing_path, open_source
from data.tars import one_of_a_key
from diffusion.coordinates import Size
from experiments.support.parsing import parse_size
from runtime.command import Command, readable_errors
from runtime.files import plain
from runtime.lock import FolderLock

FLAGS = flags.FLAGS
flags.DEFINE_string("source", None, "images: a folder, zip, tar, folder or pattern of tars, or LMDB")
flags.DEFINE_string("out", None, "result: NAME.zip, or else a folder of tar shards")
flags.DEFINE_string("size", None, "size of the result, a side or height x width as in 192x320")
flags.DEFINE_enum("channels", "3", [str(count) for count in CHANNELS], "1 grey, 3 RGB, 4 RGB and opacity")
flags.DEFINE_integer("shard_size", 1000, "images of a shard", lower_bound=1, upper_bound=10**7)
flags.DEFINE_integer("processes", os.cpu_count() or 1, "processes that work", lower_bound=1, upper_bound=1024)
flags.DEFINE_enum("on_error", "raise", ERROR_MODES, "what to do with a damaged or too small image")
flags.DEFINE_bool("verify", False, "compare what --out holds with its checksums, and do nothing else")
_FLAG_OF = {"data.root_dir": "--source", "data.on_error": "--on_error", "data.num_workers": "--processes"}
_log = logging.getLogger(__name__)


def open_work(*_: Any) -> Work | Prepared:
    """What the command line asks for. Nothing is written.

    Raises:
        ConfigError, ValueError: whatever would stop it.
    """
    needed = ("out",) if FLAGS.verify else ("out", "source", "size")
    faults = [f"--{name} is missing; accepted: {FLAGS[name].help}" for name in needed if not FLAGS[name].value]
    if FLAGS.verify:
        others = [name for name in ("source", "size") if FLAGS[name].value]
        faults += [f"--{name} is {FLAGS[name].value}; accepted: --verify with --out alone" for name in others]
    if faults:
        raise ConfigError(faults)
    result = Prepared(Path(FLAGS.out))
    if FLAGS.verify:
        return result
    return plan(FLAGS.source, result, parse_size(FLAGS.size, "size"), int(FLAGS.channels), FLAGS.shard_size,
                FLAGS.on_error, FLAGS.processes)  # fmt: skip


def plan(
    source: str, result: Prepared, size: Size, channels: int, shard_size: int, on_error: str, processes: int
) -> Work:
    """Open a source, check what would be made of it, and say how much that is. Nothing is written."""
    if not result.out.name or result.out.name.endswith((".tar", ".gz", ".tgz")):
        raise ValueError(f"--out is {result.out}; accepted: {FLAGS['out'].help}")
    with _in_words_of_flags():
        path = existing_path(source, "--source")
        opened = LsunSource(path) if is_lmdb(path) else open_source(path, "--source")
        everything = range(len(opened.names))
        images = ImageFiles("images", opened, everything, size, channels, on_error=on_error, in_memory="never")
    names = [images.item_name(i) for i in range(len(images))]
    if wrong := [name for name in names if not _can_be_unpacked(name)]:
        raise ValueError(f"--source is {path}, with {wrong[0]!r}; accepted: names in UTF-8 that stay in a folder")
    members = sorted(map(member_name, names))
    if not result.zipped and len(one_of_a_key(members)) < len(members):
        raise ValueError(f"--out is {result.out}, but a tar gives one image of several that differ in their endings "
                         "alone; accepted: NAME.zip")  # fmt: skip
    settings = {"size": size, "channels": channels, "shard_size": shard_size, "source": images.fingerprint()}
    left_out = sorted(set(opened.names) - set(names))
    work = Work(images, path.name, left_out, result, shard_size, plain(settings), on_error, processes)
    work.check()
    FolderLock(work.parts).check()
    _log.info("%s: %d images, to be %dx%d (HxW) in %s", path, len(images), *size, result.out)
    return work


def main(work: Work | Prepared, _: Command) -> None:
    with readable_errors():
        if isinstance(work, Prepared):
            print(verify(work))
            return
        with _in_words_of_flags():
            work.make()
        description = work.result.read()
        count = sum(len(file["images"]) for file in description["files"])
        left_out = f", {len(description['left_out'])} left out" if description["left_out"] else ""
        print(f"written: {work.result.out} ({count} images{left_out}; checksums in {work.result.description})")


@contextlib.contextmanager
def _in_words_of_flags() -> Iterator[None]:
    """Let errors name flags of this command where they name fields of configurations."""
    try:
        yield
    except (ValueError, ChildProcessError) as error:
        text = str(error)
        for field, flag in _FLAG_OF.items():
            text = text.replace(field, flag)
        raise ValueError(text) from error


def _can_be_unpacked(name: str) -> bool:
    return not name.startswith("/") and ".." not in name.split("/") and not re.search("[\ud800-\udfff]", name)


if __name__ == "__main__":
    Command(__doc__, {}).run_in_all(main, open_work)
