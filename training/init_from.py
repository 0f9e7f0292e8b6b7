"""The weights of another run, from which a new one starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime.checkpoint import load_weights
from runtime.stored import WEIGHTS, differences


def fitting_weights(
    run: str, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor], dict[str, Any]]:
    """The EMA weights of a run for networks of the same shapes.

    Args:
        run: its folder.
        modules: name -> network, on any device, as the run's inference file names them.
    Returns:
        name -> state of a network; all tensors of the file; and its header.
    Raises:
        ValueError: when the folder holds no weights, or not those of such networks.
    """
    try:
        tensors, header = load_weights(Path(run) / WEIGHTS)
    except ValueError as error:
        raise ValueError(f"train.init_from is {run!r}, but {error}") from None
    faults, states = [], {}
    for name, module in modules.items():
        own = module.state_dict()
        state = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        for key in own | state:
            shapes = [list(s[key].shape) if key in s else "missing" for s in (state, own)]
            if shapes[0] != shapes[1]:
                faults.append(f"{name}.{key} is {shapes[0]} there, {shapes[1]} here")
        states[name] = state
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise ValueError(f"train.init_from is {run!r}, where {faults[0]}{more}; accepted: a run with the same networks")
    return states, tensors, header


def take_over(run: str, modules: Mapping[str, nn.Module], config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Load the EMA weights of a run into networks of the same shapes.

    Args:
        run, modules: as for `fitting_weights`.
        config: the plain configuration of the new run, for the message.
    Returns:
        One line for people, and an entry for the history of the new run.
    Raises:
        ValueError: as `fitting_weights`; then nothing is loaded.
    """
    states, tensors, header = fitting_weights(run, modules)
    for name, module in modules.items():
        module.load_state_dict(states[name])
    counts = {name: len(state) for name, state in states.items()}
    event = {"init_from": str(run), "weights_step": header.get("step"), "tensors": counts}
    taken = ", ".join(f"{count} tensors of {name}" for name, count in counts.items())
    left = sorted(key for key in tensors if not key.startswith(tuple(f"{name}." for name in modules)))
    other = differences(header.get("config", {}), {**config, "train": {}})
    line = (
        f"starting from {Path(run) / WEIGHTS}, EMA weights of step {header.get('step')}: {taken}; EMA, optimiser, steps"
        f"{''.join(f', {name}' for name in left)} are this run's own"
        + (f"; configured differently: {'; '.join(other)}" if other else "")
    )
    return line, event
