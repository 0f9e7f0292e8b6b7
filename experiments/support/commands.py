"""The project's commands as parts of an experiment. Each continues where it was, so the experiment does too.

Under torchrun rank 0 of the experiment runs them, each under a torchrun of its own with as many processes.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from absl import flags

from data.datasets import SPLITS
from data.opening import read_json
from diffusion.factory import build_image_process, build_latent_process
from experiments.support.options import define
from infty_diff.folder import check_steps
from metrics.extractors import open_extractor
from runtime.processes import Processes

FLAGS = flags.FLAGS
_REPORT = "the report of calculate_fid.py"
ROOT = Path(__file__).resolve().parents[2]
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of ru_maxrss


def define_scoring_flags(num_samples: int, split: str = "train") -> None:
    """The flags of experiments that draw samples and score them; split: the default."""
    flags.DEFINE_enum("split", split, SPLITS, "part of the data set that samples are compared with")
    define(f"num_samples={num_samples}", "latent_sampling_steps", "sample_batch_size", "model", "weights",
           "run_weights", "decoder_run_weights",
           num_samples=" that are scored")  # fmt: skip


def metric_name() -> str:
    """What --model measures, for tables and axes; random features have no name of their own."""
    names = {"clip_vit_b_32": "FID_CLIP", "inception_v3": "FID", "efficientnet_lite0": "FD_EffNetLite0"}
    return names.get(FLAGS.model, f"FD ({FLAGS.model.replace('_', ' ')})")


def check_all_steps(configs: dict[str, Any], steps: Sequence[str]) -> None:
    """Raise ValueError for steps of images, or --latent_sampling_steps, that a stage does not have."""
    for some in steps:
        check_steps(build_image_process(configs["decoder_config"]), some, "--sampling_steps")
    if FLAGS.latent_sampling_steps is not None:
        check_steps(build_latent_process(configs["config"]), FLAGS.latent_sampling_steps, "--latent_sampling_steps")


def require_extractor() -> None:
    """Refuse an extractor that cannot be had before the hours of work whose result it is to score."""
    if FLAGS.num_samples < 2:
        raise ValueError(f"--num_samples is {FLAGS.num_samples}; accepted: at least 2, to be scored")
    open_extractor(FLAGS.model, torch.device("cpu"), FLAGS.weights)


def run(script: str, *arguments: str) -> float:
    """Run one of the project's commands; leave with its status if it fails. Returns its largest resident set in GB."""
    print("\n$ python", script, *arguments, flush=True)
    process = subprocess.Popen([sys.executable, *_launcher(), str(ROOT / script), *arguments])
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:  # the command got it too, and saves before it leaves
        sys.exit(process.wait())
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode if process.returncode > 0 else 128 - process.returncode)
    return usage.ru_maxrss * _RSS_UNIT / 1e9


def _launcher() -> list[str]:
    processes = Processes.from_environment().world_size
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []


def sample(out_dir: Path, model: Sequence[str], *options: str) -> None:
    """Draw what is missing of a folder of samples.

    Args:
        out_dir: the folder.
        model: the arguments --config and --decoder_config with their overrides, or --saved_model, once or twice.
        options: further arguments: which seeds, what size, how many steps.
    """
    latent = [f"--latent_sampling_steps={FLAGS.latent_sampling_steps}"] if FLAGS.latent_sampling_steps else []
    how = [f"--{name}={FLAGS[name].value}" for name in ("sample_batch_size", "run_weights", "decoder_run_weights")]
    run("experiments/generate_samples.py", *dict.fromkeys(model), *options, *latent, *how, f"--out_dir={out_dir}")


def score(samples: Path, report: Path, reference: Sequence[str]) -> dict[str, Any]:
    """The report of the first --num_samples samples, computed unless its file holds it already.

    Args:
        samples: a folder of samples.
        report: JSON file of the report; the name of --split is added, but for "train".
        reference: the arguments that name the reference images: --config with its overrides.
    """
    report = report if FLAGS.split == "train" else report.with_stem(f"{report.stem}_{FLAGS.split}")
    newest = max(file.stat().st_mtime_ns for file in samples.glob("[0-9]*.png"))
    known = read_json(report, dict, _REPORT) if report.exists() and report.stat().st_mtime_ns > newest else {}
    extractor = known.get("extractor")
    name = extractor.get("name") if isinstance(extractor, dict) else None
    if (known.get("num_samples"), name) != (FLAGS.num_samples, FLAGS.model):
        weights = [f"--weights={FLAGS.weights}"] if FLAGS.weights else []
        run("experiments/calculate_fid.py", f"--samples={samples}", *reference, f"--split={FLAGS.split}",
            f"--model={FLAGS.model}", *weights, f"--num_samples={FLAGS.num_samples}", f"--json={report}")  # fmt: skip
    return read_json(report, dict, _REPORT)
