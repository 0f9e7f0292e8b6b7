"""Choose how a trained model samples, by the Fréchet distance to held-out images, and store that with its weights.

    python experiments/choose_sampling.py --saved_model=landscapes-32 --latent_sampling_steps=100

Draws --num_samples images with each of --samplers at each of --steps, scores them, and prints distance against steps
for every solver. Chosen is what takes the fewest steps among those whose distance is at most --within above the least.
Where a filter undoes the mollifier, each of --filters is then tried with that. Of a saved model the choice becomes the
default of every command and of Python. Seeds are not those of tables, which begin at 0.

In --out_dir: a folder of samples and a report for each setting, choose_sampling.txt, .json and .png. Run again, it goes
on; what was scored before counts as long as the tensors of the weights are the same.
"""

import contextlib
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from configs.schema import ImageConfig, LatentConfig
from diffusion.factory import build_image_process
from experiments.support.commands import (
    check_all_steps,
    define_scoring_flags,
    metric_name,
    require_extractor,
    sample,
    score,
)
from experiments.support.options import between, define, settings_name
from experiments.support.plots import line_plot, require_matplotlib
from experiments.support.results import digest
from experiments.support.tables import aligned
from infty_diff.loading import store_sampling
from infty_diff.sampling import SamplingOptions
from runtime.claimed import claim_folder
from runtime.command import Command, readable_errors
from runtime.files import write_atomic, write_json
from runtime.lock import FolderLock
from runtime.run_dir import run_path
from runtime.saved import saved_files
from runtime.stored import weights_path
from runtime.weights import load_weights

FLAGS = flags.FLAGS
define_scoring_flags(num_samples=500, split="val")
define("saved_model", "out_dir", out_dir="; default: choose_sampling-DIGEST in the latent run")
flags.DEFINE_list("samplers", "ddim,dpmpp", "samplers tried")
flags.DEFINE_list("steps", "5,10,15,25,50,100", "step subsets tried with each: numbers, or such as logsnr25")
flags.DEFINE_list("filters", "0.02,0.05,0.1,0.2,0.3", "values of --inv_snr tried, where a filter undoes the mollifier")
flags.DEFINE_float("within", 0.02, "how much larger the distance of fewer steps may be", **between(0.0, 10.0))
flags.DEFINE_bool("write", True, "store the choice with the weights of --saved_model; else print the table alone")
_FIRST_SEED = 1_000_000
_COLUMNS = ("sampler", "steps", "filter", "distance", "floor", "KID × 1000", "precision", "recall")


class Search:
    """Draws and scores what settings make, each once."""

    def __init__(self, command: Command, configs: dict[str, Any], out: Path) -> None:
        self.model = [word for name in ("config", "decoder_config") for word in command.arguments(name, name, {})]
        self.reference = command.arguments("decoder_config", "config", {})
        self.process = build_image_process(configs["decoder_config"])
        self.size, self.out = configs["decoder_config"].size, out
        self.rows: dict[SamplingOptions, dict[str, Any]] = {}

    def cost(self, options: SamplingOptions) -> int:
        """Evaluations of the denoiser."""
        return self.process.respaced(options.steps).schedule.num_steps

    def measure(self, options: Iterable[SamplingOptions]) -> None:
        for some in [one for one in options if one not in self.rows]:
            name = settings_name(self.size, some.steps, some.sampler)
            name += "" if self.process.gives_sharp else f"_snr{some.inv_snr}"
            folder = self.out / f"{name}_{FLAGS.num_samples}"
            seeds = f"--seeds={_FIRST_SEED}-{_FIRST_SEED + FLAGS.num_samples - 1}"
            sample(folder, self.model, seeds, f"--sampling_steps={some.steps}", f"--sampler={some.sampler}",
                   f"--inv_snr={some.inv_snr}")  # fmt: skip
            self.rows[some] = score(folder, self.out / f"{folder.name}_{FLAGS.model}.json", self.reference)

    def best(self, options: Iterable[SamplingOptions]) -> SamplingOptions:
        """The cheapest that is at most --within above the least distance, of these the best."""
        least = min(self.rows[some]["fid"] for some in options)
        near = [some for some in options if self.rows[some]["fid"] <= (1 + FLAGS.within) * least]
        return min(near, key=lambda some: (self.cost(some), self.rows[some]["fid"]))


def main(command: Command, configs: dict[str, Any]) -> None:
    with readable_errors(), contextlib.ExitStack() as held:
        for name, field, values in (("samplers", "sampler", FLAGS.samplers), ("filters", "inv_snr", FLAGS.filters)):
            for value in values:
                try:
                    SamplingOptions(**{field: value.strip()})
                except ValueError as error:
                    raise ValueError(f"--{name}: {error}") from None
        grid = [SamplingOptions(steps.strip(), sampler.strip()) for sampler in FLAGS.samplers for steps in FLAGS.steps]
        grid = list(dict.fromkeys(grid))
        filters = [SamplingOptions(inv_snr=value).inv_snr for value in FLAGS.filters]
        check_all_steps(configs, [options.steps for options in grid])
        require_extractor()
        require_matplotlib()
        files = weights(configs)
        # Of the tensors, since the choice is stored in the header.
        tensors = digest(*(tensor for file in files for _, tensor in sorted(load_weights(file)[0].items())))
        wanted = {"tensors": tensors, "latent_steps": FLAGS.latent_sampling_steps}
        default = run_path(configs["config"]) / f"choose_sampling-{digest(wanted)[:8]}"
        search = Search(command, configs, Path(FLAGS.out_dir) if FLAGS.out_dir else default)
        held.enter_context(FolderLock(search.out))
        claim_folder(search.out, "settings.json", wanted)
        search.measure(grid)
        chosen = search.best(grid)
        if not search.process.gives_sharp:
            tried = [SamplingOptions(chosen.steps, chosen.sampler, inv_snr=value) for value in filters]
            search.measure(tried)
            chosen = min([chosen, *tried], key=lambda some: search.rows[some]["fid"])
        text, path = table(search, chosen), search.out / "choose_sampling.png"
        write_atomic(path.with_suffix(".txt"), lambda temporary: temporary.write_text(text + "\n"))
        rows = [{"sampling": asdict(options), **row} for options, row in search.rows.items()]
        write_json(path.with_suffix(".json"), {"chosen": asdict(chosen), "rows": rows})
        curves = {name: {search.cost(some): search.rows[some]["fid"] for some in sorted(grid, key=search.cost)
                         if some.sampler == name} for name in dict.fromkeys(some.sampler for some in grid)}  # fmt: skip
        label = f"{metric_name()} of {FLAGS.num_samples} samples"
        line_plot(path, curves, "Sampling steps", label, "Sampler")
        print(f"\n{text}\nwritten: {path.with_suffix('.txt')}, with .json and .png beside it")
        if FLAGS.saved_model and FLAGS.write:
            store_sampling(files[0], chosen)
            print(f"stored: {files[0]} samples so by default")


def weights(configs: dict[str, Any]) -> list[Path]:
    """The files of stage one and stage two."""
    if FLAGS.saved_model:
        files = saved_files(FLAGS.saved_model)
        return [files.image, files.latent]
    which = {"decoder_config": FLAGS.decoder_run_weights, "config": FLAGS.run_weights}
    return [weights_path(run_path(configs[name]), some) for name, some in which.items()]


def table(search: Search, chosen: SamplingOptions) -> str:
    """A line for each setting, the chosen one marked."""
    lines, reports = [], list(search.rows.values())
    for options, row in search.rows.items():
        values = [f"{row['fid']:.2f}", row["floor"], f"{1000 * row['kid']:.1f}", row["precision"], row["recall"]]
        values = [value if isinstance(value, str) else "-" if value is None else f"{value:.2f}" for value in values]
        used = "none" if search.process.gives_sharp else str(options.inv_snr)
        lines.append([options.sampler + " *" * (options == chosen), options.steps, used, *values])
    head = f"{metric_name()} of {FLAGS.num_samples} samples, against {reports[0]['num_reference']} images; * is chosen"
    return f"{head}\n{aligned([_COLUMNS, *lines])}"


if __name__ == "__main__":
    command = Command(__doc__, {"config": LatentConfig, "decoder_config": ImageConfig})
    command.run(lambda configs, _: main(command, configs))
