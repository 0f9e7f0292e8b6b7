"""What there is to measure on a machine with one GPU, in one folder: tests, operators, training steps, sampling, and a
training on images of your own with its samples and scores.

    python benchmarks/gpu_day.py --out_dir=DAY --archive=ffhq.zip --config=configs/ffhq_128_config.py

Each task is one of the project's commands, takes nine minutes at most, and is done once: the same call goes on where
the last one was, also with a training that its time did not suffice for. A task that fails is recorded, and the next
one runs. --list shows the tasks, --task=NAME,NAME runs some, --slices=N lets what is not done go on N times in one
call. The network is not used: the archive (a folder or zip), a weights file of the extractor and all else are paths.

DAY/summary.txt has the state and the tables of all tasks, summary.json the states; DAY/NAME/ the table, log and JSON
of a task; DAY/runs/ the trained models; DAY/pictures/ what there is to look at. --quick does the same with tiny
networks, to see whether everything works; with --device=cpu anywhere.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.report import machine
from benchmarks.tasks import CUT, ROOT, Day, Task, as_settings, overrides

_MINUTES = 9.0
_GRACE = 60.0  # of them, to save in
_QUICK_MODEL = {
    "data.img_size": 16, "data.img_width": 16, "train.batch_size": 4, "train.sample_size": 2,
    "train.plot_sampling_steps": "2", "model.nf": 8, "model.num_conv_blocks": 1, "model.kernel_size": 3,
    "model.uno_res": 8, "model.uno_base_channels": 8, "model.uno_mults": "(1,2)",
    "model.uno_blocks_per_level": "(1,1)", "model.uno_attn_resolutions": "(4,)", "model.z_dim": 8,
    "model.time_emb_dim": 8,
}  # fmt: skip
_QUICK_LATENT = {
    "train.batch_size": 8, "train.sample_size": 2, "train.plot_sampling_steps": "2", "model.hid_channels": 16,
    "model.num_layers": 2, "model.time_embed_dim": 8, "diffusion.steps": 10,
}  # fmt: skip

OPERATORS = {
    "convolution": ("conv", "the sparse convolution against dense ones"),
    "block": ("block", "the residual block against dense ones"),
    "engines": ("engines,engines_forward", "the sparse convolution by each engine"),
    "others": ("knn,mollifier,coordinates", "neighbours, mollifier and points against exhaustive forms"),
}


def measurements(arguments: argparse.Namespace) -> list[Task]:
    """The tasks that need no data."""
    quick, device = arguments.quick, arguments.device
    tests = ["tests/test_dispatch.py"] if quick else gpu_tests()
    tasks = [Task("tests", "what only a GPU can show, and its kernels", ["-m", "pytest", "-q", *tests])]
    operators = ["benchmarks/operators.py", f"--device={device}", "--json={here}/operators.json"]
    if quick:
        small = "--sizes=8 --ratios=1,0.25 --channels=16 --batch=2 --repeats=2 --ops=block,engines,engines_forward"
        tasks.append(Task("operators", "a block, and its convolution by each engine", [*operators, *small.split()]))
    for name, (ops, what) in {} if quick else OPERATORS.items():
        for suffix, sizes in {"": "64,128", "_256": "256"}.items():
            command = [*operators, f"--ops={ops}", f"--sizes={sizes}", "--ratios=1,0.5,0.25,0.125"]
            tasks.append(Task(f"{name}{suffix}", f"{what}, at {sizes}", command))
    small = overrides("config", as_settings({"run.device": device, **(_QUICK_MODEL if quick else {})}), trains=True)
    for config in ["tiny"] if quick else ["ffhq_128", "ffhq_256"]:
        repeats = ["--ratios=0.25", "--repeats=2", "--warmup=1"] if quick else ["--ratios=1,0.5,0.25,0.125"]
        command = ["benchmarks/train_step.py", f"--config=configs/{config}_config.py", *small, *repeats]
        what = "a training step, ours and as published, by the fraction of the pixels seen"
        tasks.append(Task(f"train_step_{config}", what, [*command, "--json={here}/train_step.json"]))
    sizes = {"": "24"} if quick else {"": "256,512,1024", "_large": "2048,4096"}
    for suffix, some in sizes.items():
        command = ["benchmarks/sampling.py", f"--config=configs/{'tiny' if quick else 'ffhq_256'}_config.py", *small]
        command += [f"--sizes={some}", "--json={here}/sampling.json", f"--repeats={2 if quick or suffix else 20}"]
        command += ["--baseline="] if suffix else []  # applied directly, kernels enlarged so much would take hours
        tasks.append(Task(f"sampling{suffix}", f"an evaluation of the denoiser at {some}", command))
    return tasks


def training(arguments: argparse.Namespace) -> list[Task]:
    """The tasks that train on the archive and show what came of it."""
    quick, archive = arguments.quick, arguments.archive
    common = {"run.root_dir": "{out}/runs", "run.device": arguments.device}
    image = {**common, "run.experiment": "image", "data.name": "folder", "data.root_dir": archive.resolve()}
    image |= {**(_QUICK_MODEL if quick else {}), "train.steps": arguments.train_steps}
    latent = {**common, "run.experiment": "latent", **(_QUICK_LATENT if quick else {})}
    latent |= {"train.steps": arguments.latent_steps}

    def model(flag: str, trains: bool = False) -> list[str]:
        settings = [*as_settings(image), *arguments.set]
        return [f"--{flag}={arguments.config}", *overrides(flag, settings, trains)]

    def both(trains: bool = False) -> list[str]:
        settings = [*as_settings(latent), *arguments.set_latent]
        prior = [f"--config={arguments.latent_config}", *overrides("config", settings, trains)]
        return [*prior, *model("decoder_config")]

    steps = ["--sampling_steps=2"] if quick else []
    both_steps = [*steps, "--latent_sampling_steps=2"] if quick else []
    weights = [f"--weights={arguments.weights.resolve()}"] if arguments.weights else []
    read = (archive, *filter(None, [arguments.weights]))
    count = f"--num_samples={arguments.num_samples}"
    scored = "--samples={out}/samples/images"
    return [
        Task(
            "train",
            f"stage one, {arguments.train_steps} steps",
            ["train_inf_ae_diffusion.py", *model("config", trains=True)],
            reads=(archive,),
            continues=True,
            pictures=("runs/image/images/*.png",),
        ),
        Task(
            "train_latent",
            f"stage two, {arguments.latent_steps} steps",
            ["train_latent_diffusion.py", *both(trains=True)],
            needs=("train",),
            continues=True,
            pictures=("runs/latent/images/*.png",),
        ),
        Task(
            "reconstructions",
            "held-out images encoded and decoded",
            ["experiments/generate_recons.py", *model("config"), *steps, "--out_dir={here}/images",
             f"--num_images={2 if quick else 16}"],
            needs=("train",),
            continues=True,
            pictures=("reconstructions/images/sheet.png",),
        ),
        Task(
            "samples",
            f"{arguments.num_samples} samples at the training size",
            ["experiments/generate_samples.py", *both(), *both_steps, count, "--out_dir={here}/images"],
            needs=("train_latent",),
            continues=True,
        ),
        Task(
            "scores",
            f"Fréchet distance, KID, precision and recall of these by {arguments.model}",
            ["experiments/calculate_fid.py", scored, *model("config"), f"--model={arguments.model}", *weights,
             f"--device={arguments.device}", "--json={here}/scores.json", "--cache_dir={out}/features"],
            needs=("samples",),
            reads=read,
        ),
        Task(
            "resolutions",
            "the same seeds at many sizes",
            ["experiments/resolution_sweep.py", *both(), *both_steps, "--out_dir={here}/images",
             *(["--seeds=0", "--sizes=24"] if quick else ["--seeds=0-3"])],
            needs=("train_latent",),
            continues=True,
            pictures=("resolutions/images/resolutions.png",),
        ),
    ]  # fmt: skip


def gpu_tests() -> list[str]:
    """Test files of what runs on a GPU only, or is checked there in earnest."""
    patterns = ("gpu_s*", "*cuda*", "*triton*", "autocast", "*engines", "*enlarged")
    return sorted({str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(f"tests/test_{pattern}.py")})


def main() -> None:
    arguments = _parse()
    tasks = measurements(arguments) + (training(arguments) if arguments.archive else [])
    names = [task.name for task in tasks]
    chosen = arguments.task.split(",") if arguments.task else names
    unknown = [name for name in chosen if name not in names]
    if unknown:
        hint = "" if arguments.archive else "; with --archive also those of a training"
        _fail(f"--task is {arguments.task}: {unknown[0]!r} is no task; accepted: {', '.join(names)}{hint}")
    day = Day(tasks, arguments.out_dir.resolve(), 60 * arguments.minutes - _GRACE, _GRACE)
    if arguments.list:
        for task in tasks:
            print(f"{task.name:<22}{day.record(task)['state'] or 'not run':<17}{task.what}")
        sys.exit(0)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        _fail("--device=cuda: no CUDA device is visible to PyTorch; accepted: cpu, with --quick")
    done = day.run(chosen)
    for _ in range(arguments.slices - 1):
        if not any(day.record(task)["state"] == CUT for task in tasks):
            break
        done = day.run(chosen)
    print(f"\n{day.summary(machine(torch.device(arguments.device)))}\nwritten: {day.out / 'summary.txt'}")
    sys.exit(0 if done else 1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, required=True, help="folder of everything")
    parser.add_argument("--archive", type=Path, help="folder or zip of images to train on; without it, no training")
    parser.add_argument("--config", default="configs/ffhq_128_config.py", help="configuration of the training")
    parser.add_argument("--latent_config", default="configs/ffhq_latent_config.py", help="of its second stage")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override of --config")
    parser.add_argument("--set_latent", action="append", default=[], metavar="FIELD=VALUE", help="of --latent_config")
    parser.add_argument("--train_steps", type=int, help="steps of stage one; default: 20000")
    parser.add_argument("--latent_steps", type=int, help="steps of stage two; default: 20000")
    parser.add_argument("--num_samples", type=int, help="samples drawn and scored; default: 1000")
    parser.add_argument("--model", default="random_features", help="--model of calculate_fid.py")
    parser.add_argument("--weights", type=Path, help="its file of weights")
    parser.add_argument("--task", help="tasks to run, as NAME,NAME; default: all that are not done")
    parser.add_argument("--list", action="store_true", help="show the tasks and their state, and stop")
    parser.add_argument("--slices", type=int, default=1, help="how often a task may go on in this call")
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="of a task, at most")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny networks, and one test file")
    arguments = parser.parse_args()
    for name, usual, quick in (("train_steps", 20_000, 4), ("latent_steps", 20_000, 4), ("num_samples", 1000, 4)):
        value = getattr(arguments, name)
        value = (quick if arguments.quick else usual) if value is None else value
        if value < 2:
            _fail(f"--{name} is {value}; accepted: whole numbers from 2")
        setattr(arguments, name, value)
    if not 60 * arguments.minutes > _GRACE:
        _fail(f"--minutes is {arguments.minutes:g}; accepted: more than {_GRACE / 60:g}, which are to save in")
    for name in ("archive", "weights"):
        path = getattr(arguments, name)
        if path is not None and not path.exists():
            _fail(f"--{name} is {path}: nothing there; accepted: a path that exists")
    if arguments.device == "cpu" and not arguments.quick:
        _fail("--device is cpu; accepted: with --quick; the networks of the paper take days on a CPU")
    return arguments


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
