"""What the models in weights/ draw, and a short training that goes on from one of them: minutes on two CPU cores.

    python experiments/demo.py

First every model draws the same seeds at three sizes: demo/samples.png. Then both stages are trained for a short time,
from weights/landscapes-32 on, and the same seeds are drawn again: demo/trained.png. The commands are those of the
README. Run again, it goes on where it was. With --saved_model=NAME that model draws alone, and nothing is trained.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from configs.demo_config import get_config
from configs.schema import ImageConfig
from diffusion.coordinates import Size
from experiments.support.commands import ROOT, run
from metrics.resize import by
from runtime.command import readable_errors
from runtime.files import file_digest
from runtime.processes import Processes
from runtime.saved import saved_config, saved_files, shipped_names
from runtime.sheet import Row, save_sheet

OUT = Path("demo")
SAMPLING = ["--latent_sampling_steps=100", "--seeds=0-5"]
SIZES = ((1, 1), (2, 2), (1.5, 2.5))  # times the training size
IMAGE, LATENT = "configs/demo_config.py", "configs/demo_latent_config.py"
NEXT = """
Try next
  other seeds, larger    python experiments/generate_samples.py --saved_model=landscapes-32 --sample_img_size=96x160 \\
                             --latent_sampling_steps=100 --seeds=10-15
  from one to another    python experiments/interpolate.py --saved_model=fashion-32 --seeds=3,7
  a hole, filled         python experiments/inpaint.py --saved_model=landscapes-32 --box=8,8,12,12
  images of your own     README.md, "Your own images"
  from Python            README.md, "From Python", and examples/quickstart.ipynb"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saved_model", help="a name in weights/, or a folder: draw with this model alone")
    saved = parser.parse_args().saved_model
    if saved and Path(saved).expanduser().exists():
        saved = str(Path(saved).expanduser().resolve())
    os.chdir(ROOT)
    with readable_errors():
        size_of = {name: saved_config(name, ImageConfig).size for name in ([saved] if saved else shipped_names())}
    rows: list[Row] = []
    for name in sorted(size_of, key=lambda name: (size_of[name], name != get_config().train.init_from)):
        for size in sizes(size_of[name]):
            samples = draw([f"--saved_model={name}"], size, folder(name))
            rows.append(Row(samples, f"{Path(name).name}, {by(size)}{' (training)' * (size == size_of[name])}"))
        save_sheet(OUT / "samples.png", rows)
        print(f"\nLook at {OUT / 'samples.png'}: what {Path(name).name} draws, the same seeds at every size.")
    if not saved:
        train(get_config().train.init_from)
        print(NEXT)


def sizes(training: Size) -> list[Size]:
    """The sizes (H, W) that a model trained at `training` draws."""
    return [(round(height * training[0]), round(width * training[1])) for height, width in SIZES]


def folder(name: str) -> Path:
    """Where the pictures of a saved model go; other weights of this name have another folder."""
    files = saved_files(name)
    digests = [file_digest(path)[:6] for path in (files.image, files.latent) if path]
    return OUT / "-".join([Path(name).name, *digests])


def draw(model: list[str], size: Size, out: Path) -> list[Image.Image]:
    """The samples of a model at a size, drawn unless they are there."""
    out = out / f"samples_{by(size)}"
    run("experiments/generate_samples.py", *model, f"--sample_img_size={by(size)}", *SAMPLING, f"--out_dir={out}")
    return [Image.open(path, formats=("PNG",)) for path in sorted(out.glob("[0-9]*.png"))]


def train(name: str) -> None:
    """Go on from a saved model, and show its samples beside those that it drew before."""
    out, size = folder(name), sizes(saved_config(name, ImageConfig).size)[1]
    run("train_inf_ae_diffusion.py", f"--config={IMAGE}", f"--config.run.root_dir={out}")
    model = [f"--config={LATENT}", f"--config.run.root_dir={out}"]
    model += [f"--decoder_config={IMAGE}", f"--decoder_config.run.root_dir={out}"]
    run("train_latent_diffusion.py", *model)
    before = draw([f"--saved_model={name}"], size, out)
    after = draw([*model, "--sampling_steps=25"], size, out / "trained")
    save_sheet(OUT / "trained.png", [Row(before, f"{name}, {by(size)}"), Row(after, "the same seeds, trained on")])
    print(f"\nLook at {OUT / 'trained.png'}: samples before and after. Logs and previews of the training: {out}/demo")


if __name__ == "__main__" and Processes.from_environment().is_rank_0:
    main()
