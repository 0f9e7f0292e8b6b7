"""Table 3 of the paper: what training on fewer coordinates costs and saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from configs.validate import shown
from experiments.support.tables import aligned
from metrics.evaluation import SCORES

_LONGEST = 20  # characters of a fraction


@dataclass(frozen=True)
class RatioResult:
    """What was measured at one ratio.

    ratio: fraction of the coordinates. points: their number. images_per_second: in training. memory_gb: in training.
    report: what `metrics.evaluation` found of the samples, None if not computed.
    """

    ratio: Fraction
    points: int
    images_per_second: float
    memory_gb: float
    report: Mapping[str, Any] | None


def parse_ratios(text: str) -> list[Fraction]:
    """ "1,1/2,0.25" -> fractions.

    Raises:
        ValueError: for anything but distinct fractions above 0 and up to 1.
    """
    parts = [part.strip() for part in text.split(",")]
    try:  # an exponent could ask for a number of gigabytes
        ratios = [Fraction(part) for part in parts if len(part) <= _LONGEST and "e" not in part.lower()]
    except (ValueError, ZeroDivisionError):
        ratios = []
    if len(set(ratios)) < len(parts) or not all(0 < ratio <= 1 for ratio in ratios):
        raise ValueError(
            f"--ratios is {shown(text)}; accepted: distinct fractions above 0 and up to 1, e.g. 1,1/2,1/4,1/8"
        )
    return ratios


def rows(results: Sequence[RatioResult]) -> list[dict[str, Any]]:
    """The results as plain values, with the speed-up over the first and the SCORES of the report, or None."""
    first, found = results[0].images_per_second, []
    for result in results:
        row = {**asdict(result), "ratio": str(result.ratio), "speedup": result.images_per_second / first}
        report = row.pop("report") or {}
        found.append({**row, **{name: report.get(name) for name in SCORES}})
    return found


def table(results: Sequence[RatioResult], metric: str) -> str:
    """The table for people, as the paper prints it, with the memory its text speaks of.

    Beside the distance it has what as many real images would have, the floor, and the other SCORES.
    """
    header = ("Ratio", "Points", metric, "Floor", "KID×1000", "Precision", "Recall", "Images/s", "Speed-up", "Memory")
    lines = [header]
    for row in rows(results):
        scales = {"fid": 1, "floor": 1, "kid": 1000, "precision": 1, "recall": 1}
        scores = ["-" if row[name] is None else f"{scale * row[name]:.2f}" for name, scale in scales.items()]
        lines.append((row["ratio"], str(row["points"]), *scores, f"{row['images_per_second']:.1f}",
                      f"{row['speedup']:.2f}x", f"{row['memory_gb']:.2f} GB"))  # fmt: skip
    return aligned(lines)
