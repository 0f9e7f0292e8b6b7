"""The state of a training run: what it goes on from, and whether a state is one of this run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from runtime.stored import differences, require_config, stage_of
from runtime.weights import require_fitting

log = logging.getLogger(__name__)
_DRAWS = "for the whole batch"  # in earlier states each process drew for its own part
# What a training state holds beside the format, the configuration, the data and the versions.
_PARTS = {"step", "seen", "modules", "ema", "optimizer", "scaler", "stage", "means", "guard", "best"}


def state_of(trainer: Any) -> dict[str, Any]:
    """What a `Trainer` goes on from; the header of its weights comes beside it."""
    return {
        "step": trainer.step,
        "seen": trainer.seen,
        "modules": {name: module.state_dict() for name, module in trainer.stage.modules.items()},
        "ema": trainer.ema.state_dict(),
        "power_averages": trainer.power_averages.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "stage": trainer.stage.state_dict(),
        "means": trainer.means.state_dict(),
        "guard": trainer.guard.state_dict(),
        "best": trainer.best,
        "data": _data_of(trainer),
        "draws": _DRAWS,
    }


def restore(trainer: Any, state: Mapping[str, Any], where: str) -> None:
    """Let a `Trainer` go on from a state read from the file `where`; ValueError when it is none of this run."""
    stage, optimizer = trainer.stage, trainer.optimizer
    check_state(trainer, state, where)
    if trainer.processes.is_rank_0:
        _compare_data(state, where, _data_of(trainer))
        if trainer.processes.world_size > 1 and state.get("draws") != _DRAWS:
            log.info("from step %d on, random numbers are drawn for the whole batch, not by process", state["step"])
    for name, module in stage.modules.items():
        module.load_state_dict(state["modules"][name])
    trainer.ema.load_state_dict(state["ema"])
    trainer.power_averages.load_state_dict(state.get("power_averages", {}), state["step"])
    # Moments are of the state; rates and decays are of the configuration, which may have changed.
    optimizer.load_state_dict({**state["optimizer"], "param_groups": optimizer.state_dict()["param_groups"]})
    if state["scaler"]:  # that of a run without loss scaling is empty, and such a run takes nothing
        trainer.scaler.load_state_dict(state["scaler"])
    stage.load_state_dict(state["stage"])
    trainer.means.load_state_dict(state["means"])
    trainer.guard.load_state_dict(state["guard"])
    trainer.step, trainer.seen, trainer.best = state["step"], state["seen"], state["best"]


def check_state(trainer: Any, state: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a state, read from the file `where`, from which a `Trainer` cannot go on."""
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    _check(state, where, trainer.run_dir.plain_config, trainer.stage.modules, parameters)


def _data_of(trainer: Any) -> dict[str, Any]:
    return {"content": trainer.stage.fingerprint, "examples": dict(trainer.stage.examples)}


def _check(
    state: Mapping[str, Any],
    where: str,
    config: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    parameters: list[nn.Parameter],
) -> None:
    """Raise ValueError, naming `where`, for a state that cannot be continued.

    Args:
        state: as read from the file `where`.
        config: the plain configuration of this run.
        modules: its networks.
        parameters: theirs, in the order of the optimiser.
    """
    if missing := _PARTS - state.keys():
        raise ValueError(
            f"{where} is a state of another version, without {', '.join(sorted(missing))}; accepted: another "
            "run.experiment, and train.init_from with the folder of this run to start from its weights"
        )
    require_config(state.get("config"), where)
    stored, own = stage_of(state["config"]), stage_of(config)
    if stored not in (own, None):
        raise ValueError(f"{where} is a state of {stored.__name__}; accepted: one of {own.__name__}")
    if shaping := differences(state["config"], dict(config)):
        raise ValueError(
            f"{where} was written with another configuration ({'; '.join(shaping)}); accepted: the same values, or "
            "another run.experiment"
        )
    try:
        networks = {"modules": state["modules"], "ema": state["ema"]["modules"]}
        for part, states in networks.items():
            tensors = {f"{name}.{key}": value for name, held in states.items() for key, value in held.items()}
            require_fitting(modules, tensors, f"{where}: {part}")
        for number, moments in state["optimizer"]["state"].items():
            for name, moment in moments.items():
                if name.startswith("exp_avg") and moment.shape != parameters[number].shape:
                    raise ValueError(
                        f"{where}: optimizer, where {name} of parameter {number} is {list(moment.shape)}; accepted: "
                        f"{list(parameters[number].shape)}"
                    )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not built as a training state ({type(error).__name__}: {error})") from None


def _compare_data(state: Mapping[str, Any], where: str, data: Mapping[str, Any]) -> None:
    """Warn, with both counts, when the data that there are differ from those a state was trained on."""
    before = state.get("data")
    told_by = "content" if isinstance(before, dict) and "content" in before else "examples"  # old states have dates
    if isinstance(before, dict) and before.get(told_by) != data[told_by]:
        old, new = (
            ", ".join(f"{count:,} {name}" for name, count in part.get("examples", {}).items())
            for part in (before, data)
        )
        log.warning(
            "the data have changed since %s: %s there, %s here (or other names or files)",
            where,
            old,
            new,
        )
