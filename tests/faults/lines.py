"""Command lines that must be refused: status 2, one line on standard error, nothing written.

They are made by kind: every numeric field and flag with every number that it cannot mean, every command with flags that
are broken in every way.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import lru_cache, partial
from pathlib import Path

import micro
import pictures
from configs.schema import ImageConfig, LatentConfig, sections
from forked import ROOT, run

_NUMBERS = ("nan", "inf", "-inf", "-1", str(2**63), "1e300", "-1e300", "1" * 5000, "text", "", "0x")
_TUPLES = ("nan", "inf", "(-1,)", "(0,)", f"({2**63},)", "1e300", "text", "", "(1," * 99, "1," * 10**4)
_IMAGE, _LATENT = "configs/tiny_config.py", "configs/tiny_latent_config.py"
_BOTH = {"config": _LATENT, "decoder_config": _IMAGE}
COMMANDS = {
    "train_inf_ae_diffusion.py": {"config": _IMAGE},
    "train_latent_diffusion.py": _BOTH,
    "experiments/generate_samples.py": _BOTH,
    "experiments/resolution_sweep.py": _BOTH,
    "experiments/coordinate_sparsity.py": _BOTH,
    "experiments/interpolate.py": {"config": _IMAGE},
    "experiments/generate_recons.py": {"config": _IMAGE},
    "experiments/inpaint.py": {"config": _IMAGE},
    "experiments/super_resolution.py": {"config": _IMAGE},
    "experiments/condition.py": {"config": _IMAGE},
    "experiments/calibrate_filter.py": {"config": _IMAGE},
    "experiments/choose_average.py": {"config": _IMAGE},
    "experiments/choose_sampling.py": _BOTH,
    "experiments/memorisation.py": {"config": _IMAGE},
    "experiments/restoration.py": {"config": _IMAGE},
    "experiments/calculate_fid.py": {"config": _IMAGE},
    "experiments/nearest_neighbours.py": {"config": _IMAGE},
    "experiments/import_reference_checkpoint.py": {"config": _IMAGE},
    "benchmarks/train_step.py": {"config": _IMAGE},
    "benchmarks/sampling.py": {"config": _IMAGE},
    "data/prepare.py": {},
}
_STEPS = ("0", "-1", "nan", "1e300", "text", "", str(2**63), "1,", "ddim0", "ddim3.5", "logsnr", "logsnr99999999999")
_SEEDS = ("0-999999999999", "-1", "5-2", "nan", "", "1,,2", str(2**63), f"0-{2**63}", "1" * 5000, "0-9x", "१-")
_SIZES = ("0", "-1", "0x5", "5x0", "nan", "1e3", str(2**63), f"8x{10**9}", "8x8x8", "x", "1" * 5000)
_PATHS = ("~nobody-at-all/x",)
# Flags that are read as text: how each can be broken, and in which commands.
_TEXTS = {
    "sampling_steps": _STEPS,
    "latent_sampling_steps": _STEPS,
    "seeds": _SEEDS,
    "inv_snr": ("0", "-1", "nan", "inf", "1e300", "1e-300", "", "text", "CALIBRATED"),
    "sample_img_size": _SIZES,
    "input_size": _SIZES,
    "reference_size": _SIZES,
    "sizes": (*_SIZES, "8,", "8,0"),
    "samplers": ("", "DDIM", "ddim,"),
    "filters": ("0", "-1", "nan", "inf", "", "text", "1e300"),
    "methods": ("", "text", "nearest,"),
    "lengths": ("nan", "inf", "0", "-1", "0.9", "text", "", "0.1,", str(2**63), "1" * 5000),
    "steps": ("0", "-1", "nan", "", "1,", str(2**63), "1" * 5000, "²"),
    "ratios": ("0", "-1", "nan", "inf", "", "1/0", "2", "1,1", "1e300", "1e-999999999"),
    "start_step": ("-1", "nan", "inf", str(2**63), "1.5", "1e300", "1" * 5000),
    "box": ("", "1,2,3", "0,0,0,0", "-1,0,1,1", f"0,0,1,{2**63}", "nan,0,1,1", "1" * 5000 + ",0,1,1"),
    "out_dir": _PATHS,
    "cache_dir": _PATHS,
    "json": _PATHS,
    "input": _PATHS,
    "mask": _PATHS,
    "sensors": (*_PATHS, "", "missing.csv", "README.md", "/dev/zero"),
    "latents": ("", "text"),
    "samples": _PATHS,
    "reference": _PATHS,
    "encoder_run": _PATHS,
    "checkpoint": _PATHS,
    "weights": _PATHS,
    "device": ("gpu9", "cuda:-1", "cuda:99", "", "cuda:nan"),
    "sampler": ("", "DDIM", "nan"),
    "split": ("", "test"),
    "source": (*_PATHS, "", "nowhere", "*.tar", "{0..999999999}", "{a,b}/*.tar", "/dev/zero"),
    "out": (*_PATHS, "", "x.tar", "."),
    "size": _SIZES,
    "channels": ("", "2", "nan"),
    "on_error": ("", "ignore"),
    "verify": ("perhaps",),
}
_CONFIGS = {  # files of configurations that do not give one
    "raises": "raise RuntimeError('two\\nlines')",
    "exits": "import sys\nsys.exit(0)",
    "exits_silently": "raise SystemExit",
    "generator_exit": "def get_config():\n    raise GeneratorExit",
    "own_exception": "class Stop(BaseException): pass\nraise Stop('here')",
    "endless": "def get_config():\n    return get_config()",
    "none": "def get_config():\n    return None",
    "no_function": "x = 1",
    "wants_arguments": "def get_config(a):\n    return a",
    "syntax": "def get_config(:\n",
    "binary": "\x00\x01",
    "empty": "",
    "empty_config": "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()",
    "list_for_section": "from configs.defaults import image_config\ndef get_config():\n    c = image_config()\n"
    "    c.unlock()\n    del c['model']\n    c.model = [1]\n    return c",
}


def field_faults(stage: type, name: str) -> Iterator[str]:
    """Overrides of every numeric field, each with a number out of its range or no number."""
    for section, cls in sections(stage).items():
        for spec in fields(cls):
            if spec.type in (int, float) and not spec.metadata["choices"]:
                below = ["0"] if spec.metadata["low"] > 0 else []
                above = [str(spec.type(spec.metadata["high"]) * 2 + 1)]
                for value in (*_NUMBERS, *below, *above):
                    yield f"--{name}.{section}.{spec.name}={value}"
            elif spec.type is tuple:
                for value in _TUPLES:
                    yield f"--{name}.{section}.{spec.name}={value}"


def flag_faults(script: str) -> Iterator[str]:
    """The flags of a script, each broken in every way that its kind allows."""
    for flag, numeric in script_flags(script).items():
        if numeric:
            yield from (f"--{flag}={value}" for value in _NUMBERS)
        else:
            yield from (f"--{flag}={value}" for value in _TEXTS.get(flag, ()))


# Calls that define the flags of several commands -> the module of experiments/support and its functions.
_SHARED = {
    "define_scoring_flags(": ("commands", ("define_scoring_flags",)),
    "edit.define_flags(": ("editing", ("define_flags", "define_input_flags")),
    "edit.define_input_flags(": ("editing", ("define_input_flags",)),
    "\ndefine_flags(": ("comparing", ("define_flags",)),
}


def script_flags(script: str) -> dict[str, bool]:
    """The flags that a script defines: name -> whether it is a number."""
    from experiments.support import options

    found: dict[str, bool] = {}
    text = (ROOT / script).read_text()
    parts: list[ast.AST] = [ast.parse(text)]
    for called, (module, functions) in _SHARED.items():
        if called in text:
            shared = ast.parse((ROOT / f"experiments/support/{module}.py").read_text())
            parts += [part for part in shared.body if getattr(part, "name", "") in functions]
    for part in parts:
        for call in ast.walk(part):
            if not isinstance(call, ast.Call):
                continue
            called = ast.unparse(call.func)
            texts = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if called.startswith("flags.DEFINE_") and texts:
                found[texts[0]] = called.endswith(("integer", "float"))
            elif called == "define":
                for name in (text.partition("=")[0] for text in texts):
                    definer = options._FLAGS[name][0].__name__
                    found[name] = definer.endswith(("integer", "float"))
    return found


def broken(name: str, file: str) -> list[list[str]]:
    """Arguments of any command that are wrong in themselves, for its configuration `name`, given by `file`."""
    return [
        [],
        [f"--{name}"],
        [f"--{name}="],
        [f"--{name}=missing_config.py"],
        [f"--{name}=configs"],
        [f"--{name}=/dev/zero"],
        [f"--{name}={'x' * 5000}.py"],
        [f"--{name}=~nobody-at-all/x_config.py"],
        [f"--{name}=README.md"],
        [f"--{name}={file}", "--no_such_flag"],
        [f"--{name}={file}", "stray"],
        [f"--{name}={file}", "--dry_run=perhaps"],
        [f"--{name}={file}", f"--{name}.no.field=1"],
        [f"--{name}={file}", f"--{name}.run.no_field=1"],
        [f"--{name}={file}", f"--{name}.run=1"],
        [f"--{name}={file}", f"--{name}.run.experiment.more=1"],
        [f"--{name}={file}", f"--{name}..=1"],
        [f"--{name}={file}", f"--no{name}.run.seed"],
        [f"--{name}={file}", f"--{name}.run.experiment=../up"],
        [f"--{name}={file}", f"--{name}.run.experiment="],
        [f"--{name}={file}", f"--{name}.run.experiment={'x' * 5000}"],
        [f"--{name}={file}", f"--{name}.run.root_dir=~nobody-at-all/x"],
        [f"--{name}={file}", "--flagfile=missing"],
    ]


def table(scratch: Path) -> Iterator[tuple[list[str], str]]:
    """All command lines, and what the message must name; runs go to scratch / "runs"."""
    for stage, script in ((ImageConfig, "train_inf_ae_diffusion.py"), (LatentConfig, "train_latent_diffusion.py")):
        for argument in field_faults(stage, "config"):
            yield [script, *good(script, scratch), argument], _name(argument)
    script = "experiments/generate_samples.py"
    for argument in field_faults(ImageConfig, "decoder_config"):
        yield [script, *good(script, scratch), argument], _name(argument)
    for script, files in COMMANDS.items():
        for argument in flag_faults(script):
            yield [script, *good(script, scratch), argument], _name(argument)
        for name, file in list(files.items())[:1]:
            for arguments in broken(name, file):
                given = good(script, scratch, without=name if len(arguments) < 2 else "")
                yield [script, *given, *arguments], _name(arguments[-1]) if arguments else name
            for config in _CONFIGS:
                broken_config = f"--{name}={scratch / 'configs' / config}.py"
                yield [script, *good(script, scratch, without=name), broken_config], name


def _name(argument: str) -> str:
    """The last part of the name of a flag or a field."""
    return argument.lstrip("-").partition("=")[0].split(".")[-1]


@lru_cache
def good(script: str, scratch: Path, without: str = "") -> list[str]:
    """Arguments of a script that are right."""
    given = []
    for name, file in COMMANDS[script].items():
        if name != without:
            existing = micro.latent(scratch / "runs").run if file == _LATENT else micro.image(scratch / "runs").run
            changes = {"run.root_dir": existing.root_dir, "run.device": "cpu", "run.experiment": existing.experiment}
            if script.startswith("train") and name == "config":
                changes |= {"run.experiment": "new", "train.steps": 1}
            given += [f"--{name}={file}", *micro.arguments(name, changes)]
    return [*given, *_GOOD.get(script, "").format(s=scratch).split()]


_GOOD = {  # what each script needs beside its configurations, {s} = the scratch folder, to be as fast as it can
    "experiments/generate_samples.py": "--num_samples=1 --sampling_steps=2 --latent_sampling_steps=2",
    "experiments/resolution_sweep.py": "--seeds=0 --sizes=16x12 --sampling_steps=2 --latent_sampling_steps=2",
    "experiments/coordinate_sparsity.py": "--ratios=1 --model=random_features --num_samples=2 --out_dir={s}/out",
    "experiments/interpolate.py": "--input={s}/pictures --sampling_steps=2",
    "experiments/generate_recons.py": "--input={s}/pictures --sampling_steps=2",
    "experiments/inpaint.py": "--input={s}/pictures --sampling_steps=2 --seeds=0 --box=0,0,2,2",
    "experiments/super_resolution.py": "--input={s}/pictures --sampling_steps=2 --ddim_encoding",
    "experiments/condition.py": "--sensors={s}/sensors.csv --sampling_steps=2 --seeds=0",
    "experiments/calibrate_filter.py": "--input={s}/pictures --num_images=1 --sampling_steps=2",
    "experiments/choose_sampling.py": "--model=random_features --num_samples=2 --out_dir={s}/out --samplers=ddim",
    "experiments/memorisation.py": "--samples={s}/pictures --model=random_features --cache_dir={s}/cache --device=cpu",
    "experiments/restoration.py": "--model=random_features --num_images=2 --sampling_steps=2 --cache_dir={s}/cache",
    "experiments/calculate_fid.py": "--samples={s}/pictures --model=random_features --cache_dir={s}/cache",
    "experiments/nearest_neighbours.py": "--samples={s}/pictures --metric=pixels --cache_dir={s}/cache --device=cpu",
    "experiments/import_reference_checkpoint.py": "--checkpoint={s}/missing",
    "benchmarks/train_step.py": "--repeats=1 --warmup=1",
    "benchmarks/sampling.py": "--repeats=1",
    "data/prepare.py": "--source={s}/pictures --out={s}/made --size=8",
}


def write_configs(scratch: Path) -> None:
    """The broken configuration files of `table`."""
    (scratch / "configs").mkdir()
    for name, text in _CONFIGS.items():
        (scratch / "configs" / f"{name}.py").write_text(text)


def write_runs(scratch: Path) -> None:
    """Two runs that lack nothing, pictures and sensors."""
    micro.write_run(micro.image(scratch / "runs"))
    micro.write_prior(micro.latent(scratch / "runs"))
    pictures.folder(scratch / "pictures", 4)
    (scratch / "sensors.csv").write_text("y,x,value1,value2,value3\n0.5,0.5,0.1,0.2,0.3\n")


def attempts(scratch: Path, _: int) -> Iterator[tuple[str, Callable[[], str]]]:
    """For the battery: every line with a call that says what went wrong, if anything did."""
    scratch /= "lines"
    scratch.mkdir()
    write_configs(scratch)
    write_runs(scratch)
    for line, named in table(scratch):
        shown = [part if len(part) < 200 else f"{part[:100]}…" for part in (line[0], *line[-2:])]
        yield " … ".join(shown), partial(fault_of, line, scratch, named)


def snapshot(folder: Path) -> dict[str, int]:
    """All files of a folder, with the times of their last changes."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def fault_of(line: list[str], scratch: Path, named: str) -> str:
    """Run a line; "" if it is refused as it should be, in a line that holds `named`."""
    before = snapshot(scratch)
    try:
        done = run(line, timeout=60)
    except subprocess.TimeoutExpired:
        return "did not end"
    errors = done.stderr.splitlines()
    said = [error for error in errors if error.startswith("error: ")]
    if done.returncode != 2 or len(said) != 1 or "Traceback" in done.stderr:
        return f"status {done.returncode}, {len(said)} lines of errors: {(said or errors)[-3:]}"
    if named not in said[0]:
        return f"does not name {named}: {said[0]}"
    return "" if snapshot(scratch) == before else "wrote files"
