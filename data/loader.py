"""Batches of a data set: endless and resumable for training, in order for encoding.

A step of training takes the next B positions of the endless sequence epoch 0, epoch 1, ..., in which epoch e is a
permutation of the data set that depends on (seed, e) alone. So what follows the first n images is known without them,
with any batch size; every step has exactly B images whatever the size of the set, and none is ever dropped.

Where items have several sizes, each size has such a sequence of its own, and a step takes from one. Of as many steps as
there are items, each size has as many as it has items. After n images, sizes take turns as after n/B steps.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.base import ImageDataset
from diffusion.random import Purpose, numpy_stream, stream


def batches(
    dataset: ImageDataset,
    batch_size: int,
    *,
    seed: int,
    seen: int = 0,
    flip: bool = True,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Iterator[torch.Tensor]:
    """Training batches after the first `seen` images, without end.

    Args:
        dataset: images; read by this process alone if they are in memory or `num_workers` is 0.
        batch_size: images per step over all ranks; a multiple of `world_size`.
        seed: of the order and the mirroring.
        seen: images before, over all ranks; what comes equals what an iterator begun at 0 gives after them.
        flip: mirror half of the images left to right, drawn anew for each epoch and image.
        num_workers: decoding processes.
        rank: this process; it gets images rank·B/world_size ... of each global batch, in order.
        world_size: number of processes.
        pin_memory: return page-locked batches where there is a GPU.

    Returns:
        uint8 (B / world_size, C, H, W), without end; the same whatever the number of workers.

    Raises:
        ValueError: an argument out of range, or (with data.on_error=raise) a damaged image.
    """
    order = _TrainingOrder(len(dataset), batch_size, seed, seen, flip, rank, world_size, _groups(dataset))
    return _read(dataset, order, num_workers, pin_memory)


def sequential(
    dataset: ImageDataset,
    batch_size: int,
    *,
    flip: bool = False,
    num_workers: int = 0,
    indices: Sequence[int] | None = None,
    pin_memory: bool = False,
) -> Iterator[torch.Tensor]:
    """Each image once, in order; the last batch may be smaller.

    Args:
        dataset: images.
        batch_size: images per batch, >= 1.
        flip: mirror all images.
        num_workers: decoding processes.
        indices: the items wanted, for instance the share of one process; all by default.
        pin_memory: return page-locked batches where there is a GPU.

    Returns:
        uint8 (B, C, H, W) batches.

    Raises:
        ValueError: batch_size out of range, or (with data.on_error=raise) a damaged image.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; accepted: integers >= 1")
    wanted = range(len(dataset)) if indices is None else indices
    parts = [np.asarray(wanted[i : i + batch_size], dtype=np.int64) for i in range(0, len(wanted), batch_size)]
    if len(groups := _groups(dataset)) > 1:
        borders = np.cumsum([len(group) for group in groups])  # items of one size follow each other
        cut = (np.split(part, np.flatnonzero(np.diff(np.digitize(part, borders))) + 1) for part in parts)
        parts = [piece for pieces in cut for piece in pieces]
    return _read(dataset, [(part, np.full(len(part), flip)) for part in parts], num_workers, pin_memory)


def index_batches(
    count: int, batch_size: int, *, seed: int, seen: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[torch.Tensor]:
    """The item numbers, int64 (B / world_size,), that `batches` would read of a set of `count` items, without end."""
    order = _TrainingOrder(count, batch_size, seed, seen, flip=False, rank=rank, world_size=world_size)
    return (torch.from_numpy(chosen) for chosen, _ in order)


class _TrainingOrder(Sampler):
    """Endless (indices, mirrored) of one rank, after a given number of images."""

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        seen: int,
        flip: bool,
        rank: int,
        world_size: int,
        groups: Sequence[Sequence[int]] = (),
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"train.batch_size is {batch_size}; accepted: multiples of the {world_size} processes")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: {rank}; accepted: 0 to {world_size - 1}")
        if seen < 0:
            raise ValueError(f"seen: {seen}; accepted: integers >= 0")
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self._seen, self._flip = seen, flip
        self._share = batch_size // world_size
        self._offset = rank * self._share
        self._groups = groups

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if len(self._groups) > 1:
            yield from self._in_turn()
            return
        epoch_of = lru_cache(maxsize=2)(self._epoch)  # a batch at the border of two epochs needs both
        first = self._seen + self._offset
        while True:
            places = [divmod(place, self._count) for place in range(first, first + self._share)]
            drawn = [(epoch_of(epoch), place) for epoch, place in places]
            yield np.array([e[0][p] for e, p in drawn]), np.array([e[1][p] for e, p in drawn])
            first += self._batch_size

    def _in_turn(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of one size each: at each step the size that is furthest behind its share."""
        sizes = np.array([len(group) for group in self._groups])
        rounds, left = divmod(self._seen // self._batch_size, self._count)
        taken, lag = rounds * sizes, np.zeros(len(sizes), dtype=np.int64)
        orders: list[Iterator[tuple[np.ndarray, np.ndarray]]] = []
        for step in itertools.count():
            if step == left:
                world = self._batch_size // self._share
                rank = self._offset // self._share
                orders = [
                    iter(_TrainingOrder(len(group), self._batch_size, self._seed, int(count) * self._batch_size,
                                        self._flip, rank, world)) for group, count in zip(self._groups, taken)
                ]  # fmt: skip
            lag += sizes
            turn = int(lag.argmax())
            lag[turn] -= self._count
            taken[turn] += 1
            if orders:
                chosen, mirrored = next(orders[turn])
                yield np.asarray(self._groups[turn])[chosen], mirrored

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the images and, in that order, which are mirrored."""
        order = numpy_stream(self._seed, Purpose.ORDER, epoch).permutation(self._count)
        chance = numpy_stream(self._seed, Purpose.MIRRORED, epoch).random(self._count)
        mirrored = (chance < 0.5) & self._flip
        return order, mirrored[order]


def _groups(dataset: ImageDataset) -> Sequence[Sequence[int]]:
    """The items of each size, where a data set has several."""
    return getattr(dataset, "groups", ())


class _Batches(Dataset):
    """Batches as the items of a data set, so that one worker makes a whole batch."""

    def __init__(self, images: ImageDataset) -> None:
        self._images = images

    def __getitem__(self, chosen: tuple[np.ndarray, np.ndarray]) -> torch.Tensor | ValueError:
        indices, mirrored = chosen
        try:
            if self._images.pixels is not None:
                batch = self._images.pixels[torch.from_numpy(indices)]
            else:
                batch = torch.stack([self._images[int(i)] for i in indices])
        except ValueError as error:
            return ValueError(str(error))  # raised by the reader: from a worker it would arrive as a traceback
        mirror = torch.from_numpy(mirrored)[:, None, None, None]
        return torch.where(mirror, batch.flip(-1), batch) if mirrored.any() else batch


def _leave_signals_to_the_main_process(_: int) -> None:
    """Ctrl-C and torchrun's signals reach a whole process group; workers must live on until training has saved."""
    os.setpgrp()


def _read(dataset: ImageDataset, chosen, num_workers: int, pin_memory: bool) -> Iterator[torch.Tensor]:
    workers = 0 if dataset.pixels is not None or _groups(dataset) else num_workers
    return from_workers(_Batches(dataset), chosen, workers, pin_memory)


def from_workers(items: Dataset, chosen, num_workers: int, pin_memory: bool = False) -> Iterator:
    """The chosen items of a map-style data set, in order, made by other processes or with 0 of them by this one.

    Raises:
        ValueError: one that comes instead of an item.
        ChildProcessError: when a process dies.
    """
    # A generator of its own: the loader would else draw from the global one.
    loader = DataLoader(
        items,
        batch_size=None,
        sampler=chosen,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        generator=stream(0, Purpose.READERS),
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_leave_signals_to_the_main_process,
    )
    made = iter(loader)
    if num_workers and threading.current_thread() is threading.main_thread():
        # PyTorch's handler raises wherever the main thread is when a worker dies, in the middle of a step too. Without
        # it the loader notices when it is asked for the next batch.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while True:
        try:
            item = next(made)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError) as error:  # the latter two while it hands over memory
            known = ("exited unexpectedly", "killed by signal")
            if isinstance(error, RuntimeError) and not any(words in str(error) for words in known):
                raise
            raise ChildProcessError(
                "a process that reads images died, perhaps for want of memory; accepted: fewer data.num_workers"
            ) from error
        if isinstance(item, ValueError):
            del made, loader  # which ends the processes
            raise item
        yield item
