"""The battery of faults: `python tests/faults/battery.py --all` tries them all and prints how many were survived.

    python tests/faults/battery.py [--all | --every=N] [--kind=lines]

A fault is survived when the command says in one line what is wrong, leaves with the status that it should, and loses,
writes or runs nothing. Without --all one of many is tried. The modules of `KINDS` hold the faults: each has a
function `attempts(scratch)` that yields pairs of a name and a call that returns "" or what went wrong.
"""

import argparse
import importlib
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

KINDS = ("lines",)
EVERY = 151  # of these, one is tried in the quick part
Attempt = tuple[str, Callable[[], str]]


def attempts(kind: str, scratch: Path, every: int = EVERY) -> Iterator[Attempt]:
    """Of the faults of a kind one in `every`; scratch: an empty folder for them."""
    return itertools.islice(importlib.import_module(f"faults.{kind}").attempts(scratch), 0, None, every)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="try every fault")
    parser.add_argument("--every", type=int, default=EVERY, help="try one of so many")
    parser.add_argument("--kind", choices=KINDS, help="try these only")
    given = parser.parse_args()
    tried, lost = 0, 0
    for kind in [given.kind] if given.kind else KINDS:
        count, start = 0, time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            for name, attempt in attempts(kind, Path(scratch), 1 if given.all else given.every):
                count += 1
                fault = attempt()
                if fault:
                    lost += 1
                    print(f"LOST {kind}: {name}\n     {fault}", flush=True)
        print(f"{kind}: {count} tried in {time.monotonic() - start:.0f} s", flush=True)
        tried += count
    print(f"{tried} tried, {tried - lost} survived, {lost} lost")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
