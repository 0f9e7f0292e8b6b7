"""Which names in a folder or an archive are those of images."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MANIFEST = "manifest.json"  # of a folder of samples
# Those of texts and numbers that come with images.
_TEXTS = ("", ".cls", ".csv", ".html", ".id", ".json", ".jsonl", ".md", ".txt", ".xml", ".yaml", ".yml")
_KINDS_SHOWN = 5
_log = logging.getLogger(__name__)


def is_image_name(name: str) -> bool:
    """Whether a relative path has an image's extension and is neither hidden nor Mac metadata."""
    return name.lower().endswith(EXTENSIONS) and not _is_hidden(name)


def image_names(path: Path, names: Iterable[str]) -> list[str]:
    """The names of images, sorted, each once; what else there is, apart from texts, is counted in lines of the log."""
    images, others, repeated = set[str](), Counter[str](), 0
    for name in names:
        if is_image_name(name):
            repeated += name in images
            images.add(name)
        elif not name.endswith("/") and not _is_hidden(name):
            others[PurePosixPath(name).suffix.lower()] += 1
    for text in _TEXTS:
        del others[text]
    if others:
        kinds = [f"{count} {kind}" for kind, count in others.most_common(_KINDS_SHOWN)]
        more = ", …" if len(others) > _KINDS_SHOWN else ""
        _log.info("%s: left out %d files of formats that are not read (%s%s)", path, others.total(),
                  ", ".join(kinds), more)  # fmt: skip
    if repeated:
        _log.warning("%s: left out %d images that a later one of the same name replaces", path, repeated)
    return sorted(images)


def _is_hidden(name: str) -> bool:
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in name.split("/"))
