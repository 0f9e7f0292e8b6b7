"""Table 3: quality, speed and memory against the fraction of the coordinates that training sees.

    python experiments/coordinate_sparsity.py --config configs/ffhq_latent_config.py \\
        --decoder_config configs/ffhq_128_config.py --decoder_config.data.root_dir=ffhq.zip --out_dir=table3

Trains both stages at every ratio, draws samples, scores them and prints the table; the same command continues an
interrupted sweep. With --skip_fid, and --config of stage one alone, it measures speed and memory only. In --out_dir:
the runs, RATIO and RATIO_sampler; the samples of each; coordinate_sparsity.json, .txt and .png. Speeds are medians over
the log of stage one. Memory is the device's in training (stage one), or on a CPU the largest resident set of the
process.
"""

import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from configs.schema import ImageConfig
from configs.validate import shown
from data.opening import read_json
from experiments.support.commands import (
    check_all_steps,
    define_scoring_flags,
    metric_name,
    require_extractor,
    run,
    sample,
    score,
)
from experiments.support.options import define
from experiments.support.plots import bar_plots, require_matplotlib
from experiments.support.run_log import log_lines, median_speed, training_memory
from experiments.support.sparsity import RatioResult, parse_ratios, rows, table
from runtime.command import Command, readable_errors, stages
from runtime.files import write_atomic, write_json

FLAGS = flags.FLAGS
define_scoring_flags(num_samples=10_000)
flags.DEFINE_string(
    "ratios", "1,1/2,1/4,1/8", "fractions of the coordinates seen in training; speeds refer to the first"
)
define("sampling_steps=100", "out_dir=coordinate_sparsity")
flags.DEFINE_bool("skip_fid", False, "measure speed and memory alone: train stage one, and nothing else")
_STATED = ("mc_integral.ratio", "mc_integral.q_sample")
_OF_SCORES = ("num_samples", "sampling_steps", "latent_sampling_steps", "sample_batch_size", "model", "weights",
              "run_weights", "decoder_run_weights")  # fmt: skip


def main(command: Command, configs: dict[str, Any]) -> None:
    image = "decoder_config" if "decoder_config" in configs else "config"
    out_dir = Path(FLAGS.out_dir)
    with readable_errors():
        require_matplotlib()
        ratios = parse_ratios(FLAGS.ratios)
        if image == "config" and not FLAGS.skip_fid:
            raise ValueError("--decoder_config is missing; accepted: stage one there, with --config of stage two, or "
                             "--config of stage one with --skip_fid")  # fmt: skip
        for path in set(_STATED) & set(command.overridden[image]):
            raise ValueError(f"--{image}.{path} is given; accepted: not here, --ratios says it")
        vain = [name for name in _OF_SCORES if FLAGS.skip_fid and FLAGS[name].present]
        if vain:
            raise ValueError(f"--{vain[0]} is {shown(str(FLAGS[vain[0]].value))}; accepted: without --skip_fid")
        train = configs[image].train
        if train.steps < train.plot_graph_steps:
            raise ValueError(f"--{image}.train.steps is {train.steps}; accepted: at least train.plot_graph_steps="
                             f"{train.plot_graph_steps}, whose log has the speed")  # fmt: skip
        if not FLAGS.skip_fid:
            check_all_steps(configs, [FLAGS.sampling_steps])
            require_extractor()
        results = [measure(command, image, ratio, out_dir) for ratio in ratios]
        text = report(results, out_dir / "coordinate_sparsity")
    print(f"\n{text}\nwritten: {out_dir / 'coordinate_sparsity'}.txt, .json and .png")


def measure(command: Command, image: str, ratio: Fraction, out_dir: Path) -> RatioResult:
    """Train, sample and score at one ratio, as far as that is not done; `image`: the flag of stage one."""
    config: ImageConfig = command.configs[image]
    name = f"ratio_{str(ratio).replace('/', '-')}"
    changes = {"run.root_dir": out_dir, "run.experiment": name, "mc_integral.ratio": float(ratio)}
    resident = run("train_inf_ae_diffusion.py", *command.arguments(image, "config", changes))
    log = log_lines(out_dir / name)
    memory = training_memory(log, config.train.plot_samples_steps) or largest(out_dir / name, resident)
    scores = None if FLAGS.skip_fid else score_samples(command, name, changes, out_dir)
    points = int(config.size[0] * config.size[1] * float(ratio))
    return RatioResult(ratio, points, median_speed(log), memory, scores)


def largest(run_folder: Path, resident: float) -> float:
    """The largest resident set of a run in GB: a command that only finds it finished takes less."""
    path = run_folder / "resident_memory.json"
    known = read_json(path, dict, '{"gb": number}').get("gb") if path.exists() else 0.0
    if not isinstance(known, int | float):
        raise ValueError(f"{path}: holds no number gb; accepted: what this command wrote")
    write_json(path, {"gb": max(known, resident)})
    return max(known, resident)


def score_samples(command: Command, name: str, changes: dict[str, Any], out_dir: Path) -> dict[str, Any]:
    """Train the latent model of a ratio, draw samples and score them; returns the report."""
    latent = {"run.root_dir": out_dir, "run.experiment": f"{name}_sampler"}
    prior = command.arguments("config", "config", latent)
    decoder = command.arguments("decoder_config", "decoder_config", changes, trains=False)
    run("train_latent_diffusion.py", *prior, *decoder, f"--decoder_run_weights={FLAGS.decoder_run_weights}")
    model = [*command.arguments("config", "config", latent, trains=False), *decoder]
    samples = out_dir / f"{name}_samples"
    sample(samples, model, f"--num_samples={FLAGS.num_samples}", f"--sampling_steps={FLAGS.sampling_steps}")
    return score(
        samples, out_dir / f"{name}_fid.json", command.arguments("decoder_config", "config", changes, trains=False)
    )


def report(results: list[RatioResult], stem: Path) -> str:
    """Write the table as text, JSON and plot; return it."""
    metric, found = metric_name(), rows(results)
    settings = {key: FLAGS[key].value for key in ("num_samples", "sampling_steps", "latent_sampling_steps")}
    write_json(stem.with_suffix(".json"), {"metric": metric, "settings": settings, "rows": found})
    text = table(results, metric) + ("" if FLAGS.skip_fid else f"\n{metric} of {FLAGS.num_samples} samples")
    write_atomic(stem.with_suffix(".txt"), lambda path: path.write_text(text + "\n"))
    panels = {} if FLAGS.skip_fid else {metric: [row["fid"] for row in found]}
    panels |= {"Training speed-up": [row["speedup"] for row in found]}
    panels |= {"Training memory (GB)": [row["memory_gb"] for row in found]}
    bar_plots(stem.with_suffix(".png"), [row["ratio"] for row in found], panels, "Fraction of the coordinates")
    return text


if __name__ == "__main__":
    command = Command(__doc__, stages(sys.argv), as_given=("config", "decoder_config"))
    command.run(lambda configs, _: main(command, configs))
