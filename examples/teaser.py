"""Draw assets/samples.png: the same seeds at several sizes, by the weights in weights/landscapes-32."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from infty_diff import InftyDiff, to_pil
from runtime.sheet import Row, save_sheet

SEEDS, SIZES = range(8), ((32, 32), (128, 128), (96, 160))


def main() -> None:
    model = InftyDiff.from_runs("landscapes-32", device="cpu")
    rows = [Row(to_pil(model.sample(SEEDS, size)), f"{size[0]}x{size[1]}") for size in SIZES]
    save_sheet(ROOT / "assets" / "samples.png", rows)


if __name__ == "__main__":
    main()
