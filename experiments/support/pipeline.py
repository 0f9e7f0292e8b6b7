"""The project's commands as parts of an experiment. Each continues where it was, so the experiment does too.

Under torchrun the first process of the experiment runs them, each under a torchrun of its own with as many processes.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from absl import flags

from metrics.extractors import EXTRACTORS, open_extractor
from runtime.command import chosen_weights, define_weights_flags
from runtime.processes import Processes

FLAGS = flags.FLAGS
ROOT = Path(__file__).resolve().parents[2]
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of ru_maxrss


def define_scoring_flags(num_samples: int) -> None:
    """The flags of experiments that draw samples and score them."""
    flags.DEFINE_integer("num_samples", num_samples, "samples scored", lower_bound=2)
    flags.DEFINE_string("latent_sampling_steps", None, "step subset of the latent model; default: all steps")
    define_weights_flags("config", "decoder_config")
    flags.DEFINE_integer("sample_batch_size", 16, "images drawn together on a GPU", lower_bound=1)
    models = [name for name in EXTRACTORS if name != "encoder"]  # whose features differ between the models compared
    flags.DEFINE_enum("fid_model", "clip_vit_b_32", models, "feature extractor of the Fréchet distance")
    flags.DEFINE_string("fid_weights", None, "file of the extractor's weights; default: the usual cache, or a download")


def metric_name() -> str:
    """What --fid_model measures, for tables and axes; random features have no name of their own."""
    names = {"clip_vit_b_32": "FID_CLIP", "inception_v3": "FID", "efficientnet_lite0": "FD_EffNetLite0"}
    return names.get(FLAGS.fid_model, f"FD ({FLAGS.fid_model.replace('_', ' ')})")


def require_extractor() -> None:
    """Refuse weights that are missing or wrong before the hours of work whose result they are to score."""
    open_extractor(FLAGS.fid_model, torch.device("cpu"), FLAGS.fid_weights)


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


def decoder_weights() -> str:
    """The argument that says which weights of the run of --decoder_config are loaded."""
    return f"--decoder_run_weights={chosen_weights('decoder_config')}"


def sample(out_dir: Path, model: Sequence[str], *options: str) -> None:
    """Draw what is missing of a folder of samples.

    Args:
        out_dir: the folder.
        model: the arguments --config and --decoder_config, with their overrides.
        options: further arguments: which seeds, what size, how many steps.
    """
    latent = [f"--latent_sampling_steps={FLAGS.latent_sampling_steps}"] if FLAGS.latent_sampling_steps else []
    how = [f"--sample_batch_size={FLAGS.sample_batch_size}", f"--run_weights={chosen_weights()}", decoder_weights()]
    run("experiments/generate_samples.py", *model, *options, *latent, *how, f"--out_dir={out_dir}")


def score(samples: Path, report: Path, reference: Sequence[str]) -> dict[str, Any]:
    """The report of the first --num_samples samples, computed unless `report` holds it already.

    Args:
        samples: a folder of samples.
        report: JSON file of the report.
        reference: the arguments that name the reference images: --config with its overrides.
    """
    newest = max(file.stat().st_mtime_ns for file in samples.glob("[0-9]*.png"))
    known = json.loads(report.read_text()) if report.exists() and report.stat().st_mtime_ns > newest else {}
    if (known.get("num_samples"), known.get("extractor", {}).get("name")) != (FLAGS.num_samples, FLAGS.fid_model):
        weights = [f"--weights={FLAGS.fid_weights}"] if FLAGS.fid_weights else []
        run("experiments/calculate_fid.py", f"--samples={samples}", *reference, f"--model={FLAGS.fid_model}", *weights,
            f"--num_samples={FLAGS.num_samples}", f"--json={report}")  # fmt: skip
    return json.loads(report.read_text())
