"""Several processes: they train as one would on all their images, share work, stop, fail and continue together.

Real processes exchange real messages (gloo, on a CPU).
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.multiprocessing import spawn

import micro
import test_training
from data.datasets import open_dataset
from data.functions import ProceduralFunctions
from data.pixels import as_values
from diffusion.random import Purpose, seed_global, stream
from infty_diff.encodings import load_or_encode
from infty_diff.folder import draw_folder
from infty_diff.latent_prior import LatentPrior
from infty_diff.model import InftyDiff
from process_faults import damaged, image, loss, outcome, overflowing, share, state
from processes import COUNT, environment, free_port, together
from runtime import shared_memory
from runtime.checkpoint import checkpoint_steps, load_newest_checkpoint
from runtime.processes import Processes
from test_generation import build, folder_options
from test_training import everything, image_trainer, latent_trainer, metrics
from training import image_stage
from training.prepare import prepare_image_run
from training.trainer import Trainer

ALL_PARTS = {
    "train.batch_size": 8, "diffusion.schedule_sampler": "loss-second-moment", "diffusion.steps": 2,
    "train.plot_sampling_steps": "2", "model.stochastic_encoding": True, "model.learn_sigma": True,
    "train.plot_graph_steps": 2, "model.uno_dropout": 0.3, "train.recompute": True,
}  # fmt: skip
CASES = {"plain": {"data.num_images": 72}, "all_parts": {**ALL_PARTS, "train.accumulate": 2}}
# Computed in float64, so that another order of sums hardly shows.
DIVIDED = {
    "image": (
        image_trainer,
        {**ALL_PARTS, "train.steps": 4, "mc_integral.type": "sobol"},
    ),
    "latent": (
        partial(latent_trainer, logvar=torch.zeros(20, 2, 6)),
        {"train.steps": 4, "diffusion.schedule_sampler": "loss-second-moment", "diffusion.steps": 2,
         "diffusion.noise_schedule": "cosine", "model.dropout": 0.3, "model.learn_sigma": True,
         "train.plot_graph_steps": 2},
    ),
}  # fmt: skip


def work(rank: int, port: int, root: Path) -> None:
    """What two processes do for the tests below, in one start of them."""
    os.environ.update(environment(rank, port))
    torch.set_num_threads(1)
    processes, kept = Processes.from_environment(), {}
    with processes.connected():
        for name, changes in CASES.items():
            whole = image_trainer(root / name / "whole", changes, processes)
            whole.run()
            image_trainer(root / name / "parts", {**changes, "train.steps": 3}, processes).run()
            second = image_trainer(root / name / "parts", changes, processes)
            second.run()
            kept[name] = {"weights": weights(whole), "resumed": weights(second), "stage": whole.stage.state_dict()}
        image_trainer(root / "grown", processes=processes).run()
        with float64():
            for name, (make, changes) in DIVIDED.items():
                for parts in (1, 2):
                    trainer = make(root / f"{name}{parts}", {**changes, "train.accumulate": parts}, processes)
                    exchanges = counted(trainer)
                    kept[f"{name}{parts}"] = {**trained(trainer), "exchanges": len(exchanges)}
        kept["images"] = images_of(root, processes)
        skipping = overflowing(root / "skipping", processes, range(2, 4))
        skipping.run()
        kept["skipping"] = {"weights": weights(skipping), "held_out": skipping.best}
        for seeds in ([4], [0, 1, 2, 4]):
            draw_folder(build(root), root / "samples", seeds, folder_options(), {}, processes)
        faults = (share, damaged, image, loss, state)
        kept["faults"] = {fault.__name__: outcome(fault, root, processes) for fault in faults}
    torch.save(kept, root / f"process_{rank}.pt")


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Networks, noise and images in float64; procedural functions are evaluated in float32 all the same."""

    def opened(*given):
        torch.set_default_dtype(torch.float32)
        try:
            return open_dataset(*given)
        finally:
            torch.set_default_dtype(torch.float64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_training, "open_dataset", opened)
        patch.setattr(image_stage, "as_values", lambda images: as_values(images).double())
        normalise = LatentPrior.normalise
        patch.setattr(LatentPrior, "normalise", lambda prior, latents: normalise(prior, latents).double())
        patch.setattr(Trainer, "_save_previews", lambda trainer: None)  # samplers compute in float32
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def counted(trainer: Trainer) -> list:
    """One entry for each time that processes exchange gradients."""
    seen = []

    def exchange(group, bucket):
        seen.append(bucket.index())
        return allreduce_hook(group, bucket)

    trainer.divided.parallel.register_comm_hook(None, exchange)
    return seen


def trained(trainer: Trainer) -> dict:
    """What a run of a trainer ends with, and what it logs."""
    trainer.run()
    lines = metrics(trainer) if trainer.processes.is_rank_0 else []
    return {"weights": weights(trainer), "timesteps": trainer.stage.state_dict()["timesteps"], "lines": lines}


def images_of(root: Path, processes: Processes) -> dict:
    """How often this process evaluates functions, and the images it has after another has changed one of them."""
    config, evaluated, evaluate = micro.image(root / "images"), [], ProceduralFunctions.evaluate_many
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProceduralFunctions, "evaluate_many", lambda *given: (evaluated.append(1), evaluate(*given))[1])
        pixels = prepare_image_run({"config": config}, processes).train_set.pixels
        times = len(evaluated)
        if not processes.is_rank_0:
            pixels[3] = 7
        processes.agree()
        closed = OSError("no access")
        patch.setattr(shared_memory, "_opened", lambda *_: (_ for _ in ()).throw(closed))
        own = open_dataset(config.data, "train", shared_memory.one_per_machine(processes)).pixels
    return {"times": times, "pixels": pixels.clone(), "own": own.clone()}


def weights(trainer) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": v for n, module in trainer.stage.modules.items() for k, v in module.state_dict().items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("distributed")
    image_trainer(root / "grown", {"train.steps": 3}).run()
    spawn(work, (free_port(), root), COUNT)
    return root


def kept(root: Path, part: str) -> list[dict]:
    return [torch.load(root / f"process_{rank}.pt")[part] for rank in range(COUNT)]


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def by_hand(trainer: Trainer) -> dict:
    """What `trained` returns, of whole batches: gradients clipped and averages of the log taken by hand."""
    stage, config = trainer.stage, trainer.config
    parameters = {name: list(module.parameters()) for name, module in stage.modules.items()}
    optimizer = torch.optim.AdamW(
        [p for group in parameters.values() for p in group], config.optimizer.learning_rate,
        (config.optimizer.adam_beta1, config.optimizer.adam_beta2), weight_decay=config.optimizer.weight_decay,
    )  # fmt: skip
    batches, logged = stage.batches(0), []
    for step in range(config.train.steps):
        optimizer.zero_grad()
        draws = stage.draw(stream(config.run.seed, Purpose.STEP, step, 0), config.train.batch_size)
        seed_global(config.run.seed, Purpose.DROPOUT, step, 0)
        loss, each, _ = stage.loss(next(batches), draws)
        loss.backward()
        stage.learn(draws, each)
        norms = {name: torch.cat([p.grad.flatten() for p in group]).norm() for name, group in parameters.items()}
        for name, group in parameters.items():
            for p in group:
                p.grad *= min(1.0, config.train.gradient_clip / norms[name].item())
        optimizer.step()
        logged.append((loss.item(), math.hypot(*norms.values())))
    every = config.train.plot_graph_steps
    means = [
        {name: sum(values) / every for name, values in zip(("loss", "grad_norm"), zip(*logged[i : i + every]))}
        for i in range(0, len(logged), every)
    ]
    return {"weights": weights(trainer), "timesteps": stage.state_dict()["timesteps"], "lines": means}


@pytest.mark.parametrize("name", DIVIDED)
def test_neither_processes_nor_parts_change_a_run(root, tmp_path, name):
    """Dropout and learned probabilities of timesteps included; gradients are exchanged once a step."""
    make, changes = DIVIDED[name]
    with float64():
        expected = by_hand(make(tmp_path / "hand", changes))
        alone = trained(make(tmp_path / "alone", {**changes, "train.accumulate": 4}))
    (one, other), (one_in_parts, other_in_parts) = kept(root, f"{name}1"), kept(root, f"{name}2")
    assert one["exchanges"] == one_in_parts["exchanges"] >= 4
    for found in (alone, one, other, one_in_parts, other_in_parts):
        for part in ("weights", "timesteps"):
            assert expected[part].keys() == found[part].keys()
            for key, value in expected[part].items():
                torch.testing.assert_close(found[part][key], value, rtol=1e-8, atol=1e-9)
    assert (expected["timesteps"]["counts"] >= 10).all()  # so that probabilities are learned
    for found in (alone, one, one_in_parts):
        for line, same, means in zip(found["lines"], alone["lines"], expected["lines"], strict=True):
            assert line == pytest.approx(same, rel=1e-6)  # the log is in float32
            assert {key: line[key] for key in means} == pytest.approx(means, rel=1e-6)
    assert alone["lines"][-1]["images"] == 32 and any("_loss" in key for key in alone["lines"][-1])


def test_images_are_decoded_once_for_all_processes(root):
    first, second = kept(root, "images")
    assert (first["times"], second["times"]) == (2, 0)  # for training and held out
    expected = open_dataset(micro.image(root).data, "train").pixels
    assert torch.equal(first["own"], expected) and torch.equal(second["own"], expected)
    expected[3] = 7
    assert torch.equal(first["pixels"], expected) and torch.equal(second["pixels"], expected)


def metrics_file(root: Path) -> Path:
    return root / "micro" / "metrics.jsonl"


@pytest.mark.parametrize("case", CASES)
def test_their_run_resumes_exactly_and_continues_alone(root, case):
    for process in kept(root, case):
        assert differing(process["weights"], process["resumed"]) == []
    whole, parts = (image_trainer(root / case / name, CASES[case]) for name in ("whole", "parts"))
    assert differing(everything(whole), everything(parts)) == []
    assert metrics(whole) == metrics(parts) and checkpoint_steps(parts.run_dir.checkpoints) == [6, 3]
    before = everything(parts)
    alone = image_trainer(root / case / "parts", {**CASES[case], "train.steps": 8})
    alone._resume()
    name = next(iter(weights(alone)))
    assert torch.equal(weights(alone)[name], before[f"/modules/{name.replace('.', '/', 1)}"])
    alone.run()
    assert [line["step"] for line in metrics(alone)][-1] == 8 and checkpoint_steps(alone.run_dir.checkpoints) == [8, 6]


def test_a_gradient_that_is_not_finite_in_one_is_skipped_by_all(root):
    first, second = kept(root, "skipping")
    assert differing(first["weights"], second["weights"]) == []
    lines = [json.loads(line) for line in metrics_file(root / "skipping").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 0, 0]
    assert [line["loss"] is None for line in lines] == [False, False, True, True, False, False]
    assert [line["step"] for line in lines if "val_loss" in line] == [2, 4, 6]
    assert first["held_out"]["loss"] == min(line["val_loss"] for line in lines if "val_loss" in line)


def test_a_run_of_one_process_continues_in_two(root):
    assert load_newest_checkpoint(root / "grown" / "micro" / "checkpoints")["step"] == 6
    lines = [json.loads(line) for line in metrics_file(root / "grown").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def stage_two(root: Path) -> list[str]:
    fields = micro.overrides(root, micro.LATENT, {"run.experiment": "sampler"})
    decoder = {"run.root_dir": root, "run.experiment": "micro"}
    return ["train_latent_diffusion.py", "--config", "configs/ffhq_latent_config.py",
            *micro.arguments("config", fields), "--decoder_config", "configs/ffhq_256_config.py",
            *micro.arguments("decoder_config", decoder)]  # fmt: skip


def test_encodings_are_shared_out(root):
    """The cache is the file that one process writes, and stage two trains on it."""
    run = root / "plain" / "whole" / "micro"
    done = together(stage_two(run.parent))
    assert [status for status, _ in done] == [0, 0], done
    lines = (run.parent / "sampler" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    (cache,) = (run / "latents").glob("*.safetensors")
    found = cache.read_bytes()
    cache.unlink()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    decoder = InftyDiff.from_runs(run, device="cpu")
    latents = load_or_encode(decoder, decoder.config.data, decoder.files["image"])
    torch.set_num_threads(threads)
    assert len(latents) == 72 and cache.read_bytes() == found


def test_samples_are_shared_out(root, tmp_path):
    """Fewer samples than processes at first, then the rest; each as one process draws it."""
    seeds = [0, 1, 2, 4]
    assert draw_folder(build(tmp_path), root / "samples", seeds, folder_options(), {}) == 0
    assert draw_folder(build(tmp_path), tmp_path, seeds, folder_options(), {}) == 4
    for name in [f"{seed:06d}.png" for seed in seeds] + ["contact_sheet.png"]:
        assert (root / "samples" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_fault_of_any_ends_all_with_one_line_of_the_first(root):
    first, second = kept(root, "faults")
    assert first["share"] == (2, "error: train.batch_size is 5; accepted: multiples of the 2 processes\n")
    said = r"error: data\.root_dir: \S*damaged: 1\.png .*; data\.on_error=skip goes on without it\n"
    assert first["damaged"][0] == 2 and re.fullmatch(said, first["damaged"][1])
    saved = "(training has reached step 1; its state is saved)"
    assert first["image"] == (2, f"error: process 1: 17.png is damaged {saved}\n")
    said = r"error: the gradient was not finite in 2 steps in a row .* at step 2; there is no checkpoint: begin .*\n"
    assert first["loss"][0] == 1 and re.fullmatch(said, first["loss"][1])
    said = r"error: ema\.modules\.encoder\..* is not finite at step 4; the checkpoint of step 2 is as it was: .*\n"
    assert first["state"][0] == 1 and re.fullmatch(said, first["state"][1])
    assert checkpoint_steps(root / "state" / "micro" / "checkpoints") == [2]
    assert second == {name: (status, "") for name, (status, _) in first.items()}
    assert not (root / "share").exists()
