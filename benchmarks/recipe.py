"""Recipes for a small budget, at equal processor time: which settings give the best samples?

    python benchmarks/recipe.py --out_dir=RECIPES --budget_s=1800

Of each candidate the processor time of a step is measured, and stage one trained for as many steps as take --budget_s
seconds of one thread. Stage two follows, with the same number of steps for all. Then samples are drawn and compared
with held-out images (Fréchet distance with its floor, KID, precision, recall), and held-out images are reconstructed
(PSNR). Processor time is that of the processes alone, so other work on the machine does not count.

--list shows the candidates: each changes some settings of --config, which is what all are compared with. --set and
--set_latent change settings of all. Everything lies in --out_dir: table.txt and results.json of all that is done, after
each; NAME/ with log, samples and their contact_sheet.png; runs/ with the models. The same call goes on where the last
one was cut short, and a candidate that is done is not run again. Several calls, with different --only, may share the
folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.report import machine
from benchmarks.tasks import ROOT, as_settings, execute, last_line, overrides
from data.opening import read_json
from runtime.checkpoint import load_weights
from runtime.claimed import claim_folder
from runtime.files import to_json, write_atomic, write_json
from runtime.stored import WEIGHTS

_RESULT = "the result of a candidate"
_FEWER, _MORE = 5, 45  # steps of the two runs whose difference is the time of a step: what they begin with cancels
_UNTIMED = {"train.plot_graph_steps": 5, "train.val_loss_steps": 0, "train.sample_size": 1, "data.num_images": 256}


class Candidate(NamedTuple):
    """Overrides of both stages, FIELD=VALUE, and flags of sampling; `of` names another whose models are used."""

    what: str
    image: tuple[str, ...] = ()
    latent: tuple[str, ...] = ()
    sampling: tuple[str, ...] = ()
    of: str = ""


_TINY = (
    "diffusion.model_mean_type=mollified_epsilon", "train.batch_size=16", "optimizer.learning_rate=2e-3",
    "optimizer.warmup_steps=50", "train.ema_decay=0.99", "model.time_emb_dim=64", "model.num_conv_blocks=1",
    "model.uno_base_channels=32", "model.uno_mults=(1,2,2)", "model.uno_blocks_per_level=(1,1,1)",
    "model.uno_attn_resolutions=(8,4)",
)  # fmt: skip
_TWO = ("model.uno_blocks_per_level=(1,1)", "model.uno_attn_resolutions=(8,)", "model.uno_mults=(1,2)")
_COSINE = "optimizer.schedule=cosine"
CANDIDATES = {
    "config": Candidate("the configuration as it is"),
    "tiny": Candidate("networks of configs/tiny_config.py that predict the mollified noise", _TINY),
    "tiny_filter": Candidate("these, with a weaker filter", sampling=("--inv_snr=0.3",), of="tiny"),
    "tiny_xstart": Candidate("these, predicting x_0", (*_TINY, "diffusion.model_mean_type=xstart")),
    "tiny_xstart_32": Candidate(
        "these, with batches of 32", (*_TINY, "diffusion.model_mean_type=xstart", "train.batch_size=32")
    ),
    "mollified": Candidate("predicts the mollified noise", ("diffusion.model_mean_type=mollified_epsilon",)),
    "mollified_filter": Candidate("this, with a weaker filter", sampling=("--inv_snr=0.3",), of="mollified"),
    "v": Candidate("predicts v", ("diffusion.model_mean_type=v",)),
    "rate_5e-4": Candidate("half the learning rate", ("optimizer.learning_rate=5e-4",)),
    "rate_2e-3": Candidate("twice the learning rate", ("optimizer.learning_rate=2e-3",)),
    "cosine": Candidate("the rate falls to 0", (_COSINE,), (_COSINE,)),
    "cosine_2e-3": Candidate("twice the rate, falling to 0", (_COSINE, "optimizer.learning_rate=2e-3"), (_COSINE,)),
    "no_weights": Candidate("no weights of the loss", ("diffusion.loss_weight=none",)),
    "batch_16": Candidate("batches of 16", ("train.batch_size=16",)),
    "batch_64": Candidate("batches of 64", ("train.batch_size=64",)),
    "blocks_1": Candidate("one sparse block each way", ("model.num_conv_blocks=1",)),
    "unet_24": Candidate("a narrower U-Net, more steps", ("model.uno_base_channels=24",)),
    "unet_48": Candidate("a wider U-Net, fewer steps", ("model.uno_base_channels=48",)),
    "unet_48_2": Candidate("a wider U-Net of two levels", ("model.uno_base_channels=48", *_TWO)),
    "unet_32_2": Candidate("a U-Net of two levels", _TWO),
    "nf_24": Candidate("fewer channels at the points", ("model.nf=24",)),
    "nf_48": Candidate("more channels at the points", ("model.nf=48",)),
    "ratio_4": Candidate("a quarter of the points seen", ("mc_integral.ratio=0.25",)),
    "ratio_1": Candidate("all points seen", ("mc_integral.ratio=1.0",)),
    "sigma_1": Candidate("mollifier of one pixel", ("diffusion.gaussian_filter_std=1.0",)),
    "ema_99": Candidate("a short EMA of weights", ("train.ema_decay=0.99",)),
    "ema_9995": Candidate("a long EMA of weights", ("train.ema_decay=0.9995",)),
    "latent_256": Candidate("a latent four times as large", ("model.z_dim=256",)),
}  # fmt: skip


class CommandFailed(Exception):
    """A command left with a status other than 0; says what it printed last."""


class Recipes:
    """Measures candidates; `options` are those of the command line."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out_dir.resolve()

    def image(self, flag: str, candidate: Candidate, run: str, root: Path | None = None, trains=False) -> list[str]:
        """Arguments that name stage one of a candidate, as the configuration flag `flag`."""
        where = (f"run.root_dir={root or self.out / 'runs'}", f"run.experiment={run}", "run.device=cpu")
        settings = (*self.options.set, *candidate.image, *where)
        return [f"--{flag}={self.options.config}", *overrides(flag, settings, trains)]

    def latent(self, candidate: Candidate, run: str, trains: bool = False) -> list[str]:
        """Arguments that name both stages."""
        where = (f"run.root_dir={self.out / 'runs'}", f"run.experiment={run}_sampler", "run.device=cpu")
        settings = (*self.options.set_latent, *candidate.latent, *where)
        prior = [f"--config={self.options.latent_config}", *overrides("config", settings, trains)]
        return [*prior, *self.image("decoder_config", candidate, run)]

    def measure(self, name: str) -> dict[str, Any]:
        """Train, draw and score one candidate."""
        candidate, options = CANDIDATES[name], self.options
        run = candidate.of or name
        trained = self.train(run)
        here, model = self.out / name, CANDIDATES[run]
        sampling = [f"--sampling_steps={options.sampling_steps}", *candidate.sampling]
        seconds = self.call(name, "experiments/generate_samples.py", *self.latent(model, run), *sampling,
                            f"--latent_sampling_steps={options.latent_sampling_steps}",
                            f"--num_samples={options.num_samples}", f"--out_dir={here / 'samples'}")  # fmt: skip
        image = self.image("config", model, run)
        self.call(name, "experiments/generate_recons.py", *image, *sampling, f"--num_images={options.num_recons}",
                  "--nostochastic_codes", f"--out_dir={here / 'recons'}")  # fmt: skip
        self.call(name, "experiments/calculate_fid.py", *image, f"--samples={here / 'samples'}", "--split=val",
                  f"--model={options.model}", "--device=cpu", f"--cache_dir={self.out / 'features'}",
                  f"--num_samples={options.num_samples}", f"--json={here / 'scores.json'}")  # fmt: skip
        scores = read_json(here / "scores.json", dict, "the report of calculate_fid.py")
        kept = ("metric", "fid", "floor", "kid", "kid_standard_error", "precision", "recall", "num_samples",
                "num_reference", "warnings")  # fmt: skip
        psnr = json.loads((here / "recons" / "result.json").read_text())["mean"]["random_psnr"]
        return {**trained, "sampling_cpu_s": seconds, **{key: scores[key] for key in kept}, "recon_psnr": psnr}

    def train(self, run: str) -> dict[str, Any]:
        """Both stages of a candidate, unless they are there; what they took."""
        record = self.out / "runs" / f"{run}.json"
        done = read_json(record, dict, "the record of a run") if record.exists() else {}
        if "step_cpu_s" not in done:
            done["step_cpu_s"] = self.step_seconds(run)
            done["steps"] = max(1, round(self.options.budget_s / done["step_cpu_s"]))
            write_json(record, done)
        candidate = CANDIDATES[run]
        stages = {
            "image": ("inf_ae", self.image("config", candidate, run, trains=True), done["steps"]),
            "latent": ("latent", self.latent(candidate, run, trains=True), self.options.latent_steps),
        }
        for stage, (script, arguments, steps) in stages.items():
            if f"{stage}_cpu_s" not in done:
                seconds = self.call(run, f"train_{script}_diffusion.py", *arguments, f"--config.train.steps={steps}")
                done[f"{stage}_cpu_s"] = seconds  # of the last call, if the training was cut short
                folder = self.out / "runs" / (run if stage == "image" else f"{run}_sampler")
                weights, _ = load_weights(folder / WEIGHTS)
                done[f"{stage}_parameters"] = sum(tensor.numel() for tensor in weights.values())
                write_json(record, done)
        return done

    def step_seconds(self, run: str) -> float:
        """Processor time of one training step of stage one, without reports, pictures and checkpoints."""
        with tempfile.TemporaryDirectory() as root:
            taken = []
            for steps in (_FEWER, _MORE):
                arguments = self.image("config", CANDIDATES[run], f"steps_{steps}", Path(root), trains=True)
                untimed = as_settings({**_UNTIMED, "train.steps": steps, "train.checkpoint_steps": steps})
                untimed = overrides("config", untimed, trains=True)
                taken.append(self.call(run, "train_inf_ae_diffusion.py", *arguments, *untimed))
        return max(taken[1] - taken[0], 1e-3) / (_MORE - _FEWER)

    def call(self, name: str, script: str, *arguments: str) -> float:
        """Run one of the project's commands; returns its processor time in seconds. Raises CommandFailed."""
        print(f"  {script} …", end="", flush=True)
        log = self.out / name / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as stream:
            print("\n$ python", script, *arguments, file=stream, flush=True)
            threads = {"OMP_NUM_THREADS": str(self.options.threads)}
            status, _, seconds = execute([str(ROOT / script), *arguments], stream, stream, threads)
        print(f" {seconds:.0f} s of processor time", flush=True)
        if status:
            raise CommandFailed(f"{script}: status {status}: {last_line(log)} (see {log})")
        return seconds


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What all candidates of a folder have in common."""
    return {name: value for name, value in vars(options).items() if name not in ("out_dir", "only", "list")}


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """The results of the candidates that are done, the best first."""
    found = {path.parent.name: read_json(path, dict, _RESULT) for path in out.glob("*/result.json")}
    return dict(sorted(found.items(), key=lambda item: item[1]["fid"]))


def write_table(out: Path, common: dict[str, Any]) -> str:
    """Write table.txt and results.json of all that is done; return the table."""
    results = read_results(out)
    content = {"benchmark": "recipe", **machine(torch.device("cpu")), "settings": common, "results": results}
    write_json(out / "results.json", content)
    text = table(content)
    write_atomic(out / "table.txt", lambda path: path.write_text(text + "\n"))
    return text


def table(content: dict[str, Any]) -> str:
    """The results as aligned text."""
    common, results = content["settings"], content["results"]
    lines = [f"{content['device']}, {content['instructions']}, {common['threads']} threads, torch {content['torch']}, "
             f"{content['date']}, commit {content['commit']}",
             f"{common['config']}, {common['budget_s']:g} s of processor time for stage one, {common['latent_steps']} "
             f"steps of stage two, {common['num_samples']} samples of {common['sampling_steps']} steps"]  # fmt: skip
    if results:
        first = next(iter(results.values()))
        floor = "none" if first["floor"] is None else f"{first['floor']:.1f}"
        lines.append(f"{first['metric']} to {first['num_reference']} held-out images, its floor {floor}; PSNR of "
                     f"{common['num_recons']} held-out reconstructions")  # fmt: skip
    lines += ["", f"{'candidate':<18}{'ms/step':>8}{'steps':>8}{'M param.':>9}{'FD':>8}{'KID×1000':>15}{'prec.':>7}"
              f"{'recall':>7}{'PSNR':>7}  what"]  # fmt: skip
    for name, row in results.items():
        parameters = (row["image_parameters"] + row["latent_parameters"]) / 1e6
        kid = f"{1000 * row['kid']:.1f}" + _or_none(row["kid_standard_error"], lambda e: f" ± {1000 * e:.1f}")
        lines.append(
            f"{name:<18}{1000 * row['step_cpu_s']:>8.0f}{row['steps']:>8}{parameters:>9.2f}{row['fid']:>8.1f}{kid:>15}"
            f"{_or_none(row['precision'], '{:.2f}'.format):>7}{_or_none(row['recall'], '{:.2f}'.format):>7}"
            f"{row['recon_psnr']:>7.2f}  {row['candidate'][0]}"
        )
    return "\n".join(lines)


def _or_none(value: float | None, shown: Any) -> str:
    return "" if value is None else shown(value)


def main(arguments: list[str] | None = None) -> None:
    parser, options = _parse(arguments)
    if options.list:
        for name, candidate in CANDIDATES.items():
            changes = " ".join((*candidate.image, *candidate.sampling)) or "nothing"
            print(f"{name:<18}{candidate.what}: {changes}" + (f", models of {candidate.of}" * bool(candidate.of)))
        return
    common = settings(options)
    try:
        claim_folder(options.out_dir, "settings.json", {"settings": common})
    except ValueError as error:
        parser.error(str(error))
    recipes, failed = Recipes(options), []
    for name in options.only:
        path, candidate = recipes.out / name / "result.json", list(CANDIDATES[name])
        known = read_json(path, dict, _RESULT) if path.exists() else {}
        if known.get("candidate") == json.loads(to_json(candidate)):
            continue
        print(f"{name}: {candidate[0]}", flush=True)
        try:
            write_json(path, {**recipes.measure(name), "candidate": candidate})
        except CommandFailed as error:
            print(f"  {name} failed: {error}", flush=True)
            failed.append(name)
            continue
        except KeyboardInterrupt:
            sys.exit("interrupted; the same command goes on")
        write_table(recipes.out, common)
    print(f"{write_table(recipes.out, common)}\nwritten: {recipes.out / 'table.txt'}")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def _parse(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, default=Path("recipes"), help="folder of everything")
    parser.add_argument("--config", default="configs/landscapes_32_config.py", help="configuration of stage one")
    parser.add_argument("--latent_config", default="configs/landscapes_32_latent_config.py", help="of stage two")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override of --config")
    parser.add_argument("--set_latent", action="append", default=[], metavar="FIELD=VALUE", help="of --latent_config")
    parser.add_argument("--only", default=",".join(CANDIDATES), help="candidates, as NAME,NAME; default: all")
    parser.add_argument("--budget_s", type=float, default=1800.0, help="processor time of stage one in seconds")
    parser.add_argument("--latent_steps", type=int, default=20_000, help="steps of stage two")
    parser.add_argument("--num_samples", type=int, default=500, help="samples drawn and scored, seeds from 0")
    parser.add_argument("--num_recons", type=int, default=64, help="held-out images reconstructed")
    parser.add_argument("--sampling_steps", default="25", help="step subset of samples and reconstructions")
    parser.add_argument("--latent_sampling_steps", default="100", help="step subset of the latents of samples")
    parser.add_argument("--model", default="efficientnet_lite0", help="--model of calculate_fid.py")
    parser.add_argument("--threads", type=int, default=1, help="threads of each command")
    parser.add_argument("--list", action="store_true", help="show the candidates and stop")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    for name in options.only:
        if name not in CANDIDATES:
            parser.error(f"--only: {name!r} is no candidate; accepted: {', '.join(CANDIDATES)}")
    for name, least in (("latent_steps", 1), ("num_samples", 2), ("num_recons", 1), ("threads", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} is {getattr(options, name)}; accepted: whole numbers from {least}")
    if not options.budget_s > 0:
        parser.error(f"--budget_s is {options.budget_s:g}; accepted: a number > 0")
    return parser, options


if __name__ == "__main__":
    main()
