"""The battery of faults: `python tests/faults/battery.py --all` tries them all and prints how many were survived.

    python tests/faults/battery.py [--all | --every=N] [--kind=kills] [--seed=0] [--only=kills:17]

A fault is survived when the command ends with the status that it should, says in one line what is wrong, and loses,
half-writes or runs nothing. Without --all one of many is tried. Each module of `KINDS` holds faults of one kind: its
function `attempts(scratch, seed)` yields pairs of a name and a call that returns "" or what went wrong. Random moments,
places and sizes follow from the seed and the number of the attempt.
"""

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

KINDS = {
    "lines": "command lines",
    "kills": "kills",
    "damaged": "damaged files",
    "disks": "full and read-only disks",
    "pairs": "two at once",
    "signals": "signals, dead workers",
}
# Of so many one is tried in the quick part.
EVERY = {"lines": 151, "kills": 45, "damaged": 79, "disks": 44, "pairs": 46, "signals": 53}


def attempts(kind: str, scratch: Path, every: int = 1, seed: int = 0) -> Iterator[tuple[int, str, str]]:
    """Try one in `every` fault of a kind; their numbers, names, and what went wrong or "". scratch: a folder."""
    for number, (name, attempt) in enumerate(importlib.import_module(f"faults.{kind}").attempts(scratch, seed)):
        if number % every == 0:
            yield number, name, attempt()


def only(kind: str, number: int, scratch: Path, seed: int) -> Iterator[tuple[int, str, str]]:
    """Try one fault alone."""
    for i, (name, attempt) in enumerate(importlib.import_module(f"faults.{kind}").attempts(scratch, seed)):
        if i == number:
            yield number, name, attempt()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="try every fault")
    parser.add_argument("--every", type=int, help="try one of so many")
    parser.add_argument("--kind", choices=KINDS, help="try these only")
    parser.add_argument("--seed", type=int, default=0, help="of random moments, places and sizes")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="try this one alone")
    given = parser.parse_args()
    kind, _, number = (given.only or given.kind or "").partition(":")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in [kind] if kind else KINDS:
            begun, tried, lost = time.monotonic(), 0, 0
            every = 1 if given.all else given.every or EVERY[name]
            place = Path(scratch)
            for i, told, fault in (
                only(name, int(number), place, given.seed) if given.only else attempts(name, place, every, given.seed)
            ):
                tried += 1
                if fault:
                    lost += 1
                    print(f"LOST {told}\n     {fault}\n     again: python tests/faults/battery.py --only={name}:{i} "
                          f"--seed={given.seed}", flush=True)  # fmt: skip
            rows.append((KINDS[name], tried, tried - lost, f"{time.monotonic() - begun:.0f} s"))
            print(f"{KINDS[name]}: {tried} tried, {lost} lost", file=sys.stderr, flush=True)
    print("\n| kind | tried | survived | time |\n|---|---:|---:|---:|")
    for row in rows:
        print("| {} | {:,} | {:,} | {} |".format(*row))
    tried, survived = (sum(row[i] for row in rows) for i in (1, 2))
    print(f"\n{tried:,} tried, {survived:,} survived, {tried - survived} lost")
    return 1 if survived < tried else 0


if __name__ == "__main__":
    sys.exit(main())
