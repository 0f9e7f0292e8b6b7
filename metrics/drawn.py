"""Which pictures of a folder or an archive are samples, by the manifests that lie with them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from data.names import MANIFEST
from data.opening import parse_json, read_at_most
from runtime.claimed import SEED, is_marked, mark_of, texts_of

AGAIN = "accepted: whole samples (the command that drew them draws damaged ones again)"
_SAMPLE = re.compile(r"\d{6,}\.png")
_log = logging.getLogger(__name__)


class _Source(Protocol):
    path: Path
    names: list[str]

    def open(self, i: int) -> BinaryIO: ...

    def beside(self, name: str) -> BinaryIO | None: ...


@dataclass(frozen=True)
class Drawn:
    """The samples of a source: number of the picture -> texts in its header, None of pictures without a manifest.

    manifest: what the samples say of themselves, where they are of one folder.
    """

    texts: dict[int, dict[str, str] | None]
    manifest: dict[str, Any] | None


def drawn(source: _Source, wanted: Iterable[int], field: str) -> Drawn:
    """The pictures among those `wanted` that count: of a folder with the manifest of samples those drawn into it.

    A picture belongs to the folder of the nearest manifest above it. Those that are not its samples are counted in a
    warning.

    Args:
        source: pictures of a folder or an archive.
        wanted: their numbers.
        field: what a user calls it.
    Raises:
        ValueError: for a damaged manifest or sample, and where pictures lie with manifests and none is a sample.
    """
    wanted = list(wanted)
    folders = {str(parent) for i in wanted for parent in PurePosixPath(source.names[i]).parents}
    manifests = {folder: m for folder in sorted(folders) if (m := _manifest(source, folder)) is not None}
    marks = {folder: mark_of(manifest) for folder, manifest in manifests.items()}
    texts: dict[int, dict[str, str] | None] = {}
    for i in wanted:
        name = PurePosixPath(source.names[i])
        folder = next((str(parent) for parent in name.parents if str(parent) in marks), None)
        if folder is None:
            texts[i] = None
        elif _SAMPLE.fullmatch(name.name):
            found = _texts(source, i, field)
            if is_marked(found, marks[folder]) and str(found.get(SEED)).zfill(6) == name.stem:
                texts[i] = found
    others = [source.names[i] for i in wanted if i not in texts]
    if others and not texts:
        raise ValueError(f"{field}: {source.path} has pictures, but none that its {MANIFEST} tells of; accepted: "
                         f"samples as they were drawn, or without {MANIFEST} any pictures")  # fmt: skip
    if others:
        told = "%s: left out %d pictures that were not drawn there, such as %s"
        _log.warning(told, source.path, len(others), others[0])
    return Drawn(texts, next(iter(manifests.values())) if len(manifests) == 1 else None)


def _manifest(source: _Source, folder: str) -> dict[str, Any] | None:
    """The manifest of samples in a folder of a source, None where there is none, or one of another program."""
    name = MANIFEST if folder == "." else f"{folder}/{MANIFEST}"
    where, accepted = f"{source.path}/{name}", "the manifest of a folder of samples"
    try:
        stream = source.beside(name)
        if stream is None:
            return None
        with stream:
            text = read_at_most(stream)
    except Exception as error:  # archives raise nearly anything on damaged data
        raise ValueError(f"{where}: cannot be read ({' '.join(str(error).split())}); accepted: {accepted}") from None
    found = parse_json(text, dict, where, accepted)
    return found if {"settings", "model"} <= found.keys() else None


def _texts(source: _Source, i: int, field: str) -> dict[str, str]:
    try:
        with source.open(i) as stream:
            return texts_of(stream)
    except FileNotFoundError:
        return {}
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{field}: {source.path}: {source.names[i]} cannot be read ({reason}); {AGAIN}") from None
