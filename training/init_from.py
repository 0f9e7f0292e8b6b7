"""The weights of another run, from which a new one starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infty_diff.latent_prior import STATISTICS
from runtime.saved import resolve
from runtime.stored import differences, require_config
from runtime.weights import load_networks, load_weights, require_fitting


def fitting_weights(
    run: str, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """The EMA weights of a run for networks of the same shapes.

    Args:
        run: its folder, or the folder or name of a saved model (`runtime.saved.resolve`).
        modules: name -> network, on any device, as the run's inference file names them.
    Returns:
        The tensors of the networks, all tensors of the file, and its header.
    Raises:
        ValueError: when the folder holds no weights, or not those of such networks.
    """
    try:
        return weights_of(_file(run, modules), modules)
    except ValueError as error:
        raise ValueError(f"train.init_from is {run!r}, but {error}") from None


def weights_of(
    file: Path, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """As `fitting_weights`, of a file of weights."""
    tensors, header = load_weights(file)
    beside = STATISTICS if "latent_model" in modules else ()
    networks = {name: tensor for name, tensor in tensors.items() if name not in beside}
    require_fitting(modules, networks, str(file))
    return networks, tensors, header


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
    networks, tensors, header = fitting_weights(run, modules)
    load_networks(modules, networks, f"train.init_from is {run!r}")
    counts = {name: sum(key.startswith(f"{name}.") for key in networks) for name in modules}
    event = {"init_from": str(run), "weights_step": header.get("step"), "tensors": counts}
    taken = ", ".join(f"{count} tensors of {name}" for name, count in counts.items())
    left = sorted(tensors.keys() - networks.keys())
    there = header.get("config", {})
    file = _file(run, modules)
    require_config(there, str(file))
    other = differences(there, {**config, "train": {}})
    line = (
        f"starting from {file}, EMA weights of step {header.get('step')}: {taken}; EMA, optimiser, steps"
        f"{''.join(f', {name}' for name in left)} are this run's own"
        + (f"; configured differently: {'; '.join(other)}" if other else "")
    )
    return line, event


def _file(run: str, modules: Mapping[str, nn.Module]) -> Path:
    files = resolve(run)
    return files.latent if files.latent is not None and "latent_model" in modules else files.image
