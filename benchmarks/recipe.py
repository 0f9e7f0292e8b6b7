"""Recipes for a small budget, at equal processor time or steps: which settings give the best samples?

    python benchmarks/recipe.py --out_dir=RECIPES --budget_s=1800
    python benchmarks/recipe.py --out_dir=TABLE1 --budget_s=7200 --seeds=3 --only=config,white_noise,ratio_1,reference
    python benchmarks/recipe.py --out_dir=TABLE2 --steps=5000 --seeds=3 --only="paper,ablation_*"

Of each candidate the processor time of a step is measured, and stage one trained for as many steps as take --budget_s
seconds of one thread. Stage two follows, with the same number of steps for all. Then samples are drawn and compared
with held-out images (Fréchet distance with its floor, KID, precision, recall), and held-out images are reconstructed
(PSNR). Processor time is that of the processes alone, so other work on the machine does not count. With --steps all
train for so many steps instead. With --seeds each is trained from several, and the table gives mean ± deviation.

--list shows the candidates: each changes some settings of --config, which is what all are compared with. --set and
--set_latent change settings of all. Everything lies in --out_dir: table.txt and results.json of all that is done, after
each; NAME/ with log, samples and their contact_sheet.png; runs/ with the models. The same call goes on where the last
one was cut short, and a candidate that is done is not run again. Several calls, with different --only, may share the
folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.candidates import CANDIDATES, Candidate
from benchmarks.report import machine
from benchmarks.tasks import ROOT, as_settings, execute, last_line, overrides
from data.opening import read_json
from runtime.claimed import claim_folder
from runtime.files import to_json, write_atomic, write_json
from runtime.stored import WEIGHTS
from runtime.weights import load_weights

_RESULT, _RECORD = "the result of a candidate", "the record of a run"
_FEWER, _MORE = 5, 45  # steps of the two runs whose difference is the time of a step: what they begin with cancels
_UNTIMED = {"train.plot_graph_steps": 5, "train.val_loss_steps": 0, "train.sample_size": 1, "data.num_images": 256}


class CommandFailed(Exception):
    """A command left with a status other than 0; says what it printed last."""


class Recipes:
    """Measures candidates; `options` are those of the command line."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out_dir.resolve()
        self.seed = 0  # of what is trained

    def label(self, name: str) -> str:
        """What folders and runs of a candidate are called with the present seed."""
        return f"{name}_seed{self.seed}" if self.seed else name

    def image(self, flag: str, candidate: Candidate, run: str, root: Path | None = None, trains=False) -> list[str]:
        """Arguments that name stage one of a candidate, as the configuration flag `flag`."""
        settings = (*self.options.set, *candidate.image, *self._place(run, root or self.out / "runs"))
        return [f"--{flag}={self.options.config}", *overrides(flag, settings, trains)]

    def latent(self, candidate: Candidate, run: str, trains: bool = False) -> list[str]:
        """Arguments that name both stages."""
        place = self._place(f"{run}_sampler", self.out / "runs")
        settings = (*self.options.set_latent, *candidate.latent, *place)
        prior = [f"--config={self.options.latent_config}", *overrides("config", settings, trains)]
        return [*prior, *self.image("decoder_config", candidate, run)]

    def _place(self, run: str, root: Path) -> tuple[str, ...]:
        where = (f"run.root_dir={root}", f"run.experiment={run}", f"run.device={self.options.device}")
        return (*where, f"run.seed={self.seed}") if self.seed else where

    def measure(self, name: str) -> dict[str, Any]:
        """Train, draw and score one candidate."""
        candidate, options = CANDIDATES[name], self.options
        base = candidate.of or name
        trained, run, name = self.train(base), self.label(base), self.label(name)
        here, model = self.out / name, CANDIDATES[base]
        sampling = [f"--sampling_steps={options.sampling_steps}", *candidate.sampling]
        seconds = self.call(name, "experiments/generate_samples.py", *self.latent(model, run), *sampling,
                            f"--latent_sampling_steps={options.latent_sampling_steps}",
                            f"--num_samples={options.num_samples}", f"--out_dir={here / 'samples'}")  # fmt: skip
        image = self.image("config", model, run)
        self.call(name, "experiments/generate_recons.py", *image, *sampling, f"--num_images={options.num_recons}",
                  "--nostochastic_codes", f"--out_dir={here / 'recons'}")  # fmt: skip
        self.call(name, "experiments/calculate_fid.py", *image, f"--samples={here / 'samples'}", "--split=val",
                  f"--model={options.model}", f"--device={options.device}", f"--cache_dir={self.out / 'features'}",
                  f"--num_samples={options.num_samples}", f"--json={here / 'scores.json'}")  # fmt: skip
        scores = read_json(here / "scores.json", dict, "the report of calculate_fid.py")
        kept = ("metric", "fid", "floor", "kid", "kid_standard_error", "precision", "recall", "num_samples",
                "num_reference", "warnings")  # fmt: skip
        psnr = json.loads((here / "recons" / "result.json").read_text())["mean"]["random_psnr"]
        return {**trained, "sampling_cpu_s": seconds, **{key: scores[key] for key in kept}, "recon_psnr": psnr}

    def train(self, base: str) -> dict[str, Any]:
        """Both stages of a candidate, unless they are there; what they took."""
        run, candidate = self.label(base), CANDIDATES[base]
        record, first = (self.out / "runs" / f"{name}.json" for name in (run, base))
        done = read_json(record, dict, _RECORD) if record.exists() else {}
        if "steps" not in done:
            if self.seed and first.exists():  # all seeds take as many steps
                done = {key: read_json(first, dict, _RECORD)[key] for key in ("step_cpu_s", "steps")}
            else:
                done["step_cpu_s"] = self.step_seconds(base)
                done["steps"] = self.options.steps or max(1, round(self.options.budget_s / done["step_cpu_s"]))
            write_json(record, done)
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

    def step_seconds(self, base: str) -> float:
        """Processor time of one training step of stage one, without reports, pictures and checkpoints."""
        with tempfile.TemporaryDirectory() as root:
            taken = []
            for steps in (_FEWER, _MORE):
                arguments = self.image("config", CANDIDATES[base], f"steps_{steps}", Path(root), trains=True)
                untimed = as_settings({**_UNTIMED, "train.steps": steps, "train.checkpoint_steps": steps})
                untimed = overrides("config", untimed, trains=True)
                taken.append(self.call(self.label(base), "train_inf_ae_diffusion.py", *arguments, *untimed))
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
    given = {name: value for name, value in vars(options).items() if name not in ("out_dir", "only", "list", "seeds")}
    return {name: value for name, value in given.items() if (name, value) not in (("steps", None), ("device", "cpu"))}


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
    trained = f"{common['steps']} steps" if "steps" in common else f"{common['budget_s']:g} s of processor time"
    lines = [f"{content['device']}, {content['instructions']}, {common['threads']} threads, torch {content['torch']}, "
             f"{content['date']}, commit {content['commit']}",
             f"{common['config']}, {trained} for stage one, {common['latent_steps']} steps of stage two, "
             f"{common['num_samples']} samples of {common['sampling_steps']} steps"]  # fmt: skip
    if results:
        first = next(iter(results.values()))
        floor = "none" if first["floor"] is None else f"{first['floor']:.1f}"
        lines.append(f"{first['metric']} to {first['num_reference']} held-out images, its floor {floor}; PSNR of "
                     f"{common['num_recons']} held-out reconstructions; ± of seeds, of KID of one seed its "
                     "standard error")  # fmt: skip
    lines += ["", f"{'candidate':<28}{'ms/step':>8}{'steps':>8}{'M param.':>9}{'FD':>15}{'KID×1000':>15}{'prec.':>7}"
              f"{'recall':>7}{'PSNR':>7}  what"]  # fmt: skip
    seeds: dict[str, list[dict[str, Any]]] = {}
    for label, row in results.items():
        seeds.setdefault(re.sub(r"_seed\d+$", "", label), []).append(row)
    for name, rows in sorted(seeds.items(), key=lambda item: mean(row["fid"] for row in item[1])):
        row = rows[0]
        parameters = (row["image_parameters"] + row["latent_parameters"]) / 1e6
        kid = _spread(rows, "kid", 1000)
        if len(rows) == 1:
            kid += _or_none(row["kid_standard_error"], lambda e: f" ± {1000 * e:.1f}")
        precision, recall = (_mean_or_none(rows, key) for key in ("precision", "recall"))
        lines.append(
            f"{name:<28}{1000 * row['step_cpu_s']:>8.0f}{row['steps']:>8}{parameters:>9.2f}{_spread(rows, 'fid'):>15}"
            f"{kid:>15}{precision:>7}{recall:>7}{mean(row['recon_psnr'] for row in rows):>7.2f}  {row['candidate'][0]}"
        )
    return "\n".join(lines)


def _spread(rows: list[dict[str, Any]], key: str, factor: float = 1) -> str:
    """Mean ± standard deviation over seeds."""
    values = [factor * row[key] for row in rows]
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _mean_or_none(rows: list[dict[str, Any]], key: str) -> str:
    return "" if any(row[key] is None for row in rows) else f"{mean(row[key] for row in rows):.2f}"


def _or_none(value: float | None, shown: Any) -> str:
    return "" if value is None else shown(value)


def main(arguments: list[str] | None = None) -> None:
    parser, options = _parse(arguments)
    if options.list:
        for name, candidate in CANDIDATES.items():
            changes = " ".join((*candidate.image, *candidate.sampling)) or "nothing"
            print(f"{name:<32}{candidate.what}: {changes}" + (f", models of {candidate.of}" * bool(candidate.of)))
        return
    common = settings(options)
    try:
        claim_folder(options.out_dir, "settings.json", {"settings": common})
    except ValueError as error:
        parser.error(str(error))
    recipes, failed = Recipes(options), []
    for name, seed in itertools.product(options.only, range(options.seeds)):
        recipes.seed, candidate = seed, list(CANDIDATES[name])
        label = recipes.label(name)
        path = recipes.out / label / "result.json"
        known = read_json(path, dict, _RESULT) if path.exists() else {}
        if known.get("candidate") == json.loads(to_json(candidate)):
            continue
        print(f"{label}: {candidate[0]}", flush=True)
        try:
            write_json(path, {**recipes.measure(name), "candidate": candidate})
        except CommandFailed as error:
            print(f"  {label} failed: {error}", flush=True)
            failed.append(label)
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
    parser.add_argument("--only", default=",".join(CANDIDATES), help="candidates, as NAME,NA*; default: all")
    parser.add_argument("--budget_s", type=float, default=1800.0, help="processor time of stage one in seconds")
    parser.add_argument("--steps", type=int, help="steps of stage one, the same for all, instead of --budget_s")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each, from the seeds 0, 1, …")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="with --steps, where all is computed")
    parser.add_argument("--latent_steps", type=int, default=20_000, help="steps of stage two")
    parser.add_argument("--num_samples", type=int, default=500, help="samples drawn and scored, seeds from 0")
    parser.add_argument("--num_recons", type=int, default=64, help="held-out images reconstructed")
    parser.add_argument("--sampling_steps", default="25", help="step subset of samples and reconstructions")
    parser.add_argument("--latent_sampling_steps", default="100", help="step subset of the latents of samples")
    parser.add_argument("--model", default="efficientnet_lite0", help="--model of calculate_fid.py")
    parser.add_argument("--threads", type=int, default=1, help="threads of each command")
    parser.add_argument("--list", action="store_true", help="show the candidates and stop")
    options = parser.parse_args(arguments)
    patterns, options.only = options.only.split(","), []
    for pattern in patterns:
        matching = [name for name in CANDIDATES if fnmatch(name, pattern)]
        if not matching:
            parser.error(f"--only: {pattern!r} is no candidate; accepted: {', '.join(CANDIDATES)}")
        options.only += [name for name in matching if name not in options.only]
    whole = {"latent_steps": 1, "num_samples": 2, "num_recons": 1, "threads": 1, "seeds": 1, "steps": 1}
    for name, least in whole.items():
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}; accepted: whole numbers from {least}")
    if options.device != "cpu" and options.steps is None:
        parser.error(f"--device is {options.device}; accepted: with --steps, since processor time is that of a CPU")
    if not options.budget_s > 0:
        parser.error(f"--budget_s is {options.budget_s:g}; accepted: a number > 0")
    return parser, options


if __name__ == "__main__":
    main()
