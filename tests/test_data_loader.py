"""The order of training: resumable, sharded, mirrored, and the same with and without workers."""

from collections import Counter
from itertools import islice

import pytest
import torch

from data.functions import FunctionImages
from data.loader import batches, index_batches, sequential


class Numbered:
    """Images that carry their own number, and show in which direction they look."""

    name, channels, size = "numbered", 3, (2, 4)

    def __init__(self, count, broken=None, in_memory=False):
        self._count, self._broken = count, broken
        self.pixels = torch.stack([self._make(i) for i in range(count)]) if in_memory else None

    def _make(self, i):
        if i == self._broken:
            raise ValueError(f"data.root_dir: image {i} cannot be decoded")
        return torch.stack([torch.full((2, 4), i), torch.arange(4).repeat(2, 1), torch.zeros(2, 4)]).to(torch.uint8)

    def __len__(self):
        return self._count

    def __getitem__(self, i):
        return self._make(i)


def numbers(batch):
    return batch[:, 0, 0, 0].tolist()


def mirrored(batch):
    ahead = torch.arange(4, dtype=torch.uint8)
    assert all(torch.equal(row, ahead) or torch.equal(row, ahead.flip(0)) for row in batch[:, 1, 0])
    return (batch[:, 1, 0, 0] == 3).tolist()


def take(count, *args, **options):
    return list(islice(batches(*args, **options), count))


@pytest.mark.parametrize("count, batch_size", [(10, 4), (7, 7), (3, 8), (1, 5), (13, 5)])
def test_every_epoch_sees_every_image_once(count, batch_size):
    found = take(24, Numbered(count), batch_size, seed=1)
    assert all(batch.shape == (batch_size, 3, 2, 4) and batch.dtype == torch.uint8 for batch in found)
    order = [n for batch in found for n in numbers(batch)]
    epochs = [order[i : i + count] for i in range(0, len(order) - count + 1, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 9:  # enough orders that no two agree by chance
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # each in another order


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_resuming_equals_continuing(steps):
    through = take(steps + 4, Numbered(10), 4, seed=9)
    resumed = take(4, Numbered(10), 4, seed=9, seen=4 * steps)
    assert all(torch.equal(a, b) for a, b in zip(through[steps:], resumed, strict=True))


def test_another_batch_size_goes_on_where_the_first_ended():
    """Three steps of 4 and two of 7 read what 26 steps of 1 read, whatever the number of processes."""
    singly = torch.cat(take(26, Numbered(10), 1, seed=9))
    changed = take(3, Numbered(10), 4, seed=9) + take(2, Numbered(10), 7, seed=9, seen=12)
    assert torch.equal(torch.cat(changed), singly)
    parts = [take(1, Numbered(10), 6, seed=9, seen=12, rank=r, world_size=2)[0] for r in range(2)]
    assert torch.equal(torch.cat(parts), singly[12:18])


def test_resuming_decodes_nothing_else():
    class Counting(Numbered):
        read = 0

        def __getitem__(self, i):
            self.read += 1
            return super().__getitem__(i)

    dataset = Counting(10)
    next(batches(dataset, 4, seed=9, seen=4 * 10**9))
    assert dataset.read == 4


def test_seed_and_mirroring():
    first, again, other = (take(6, Numbered(10), 5, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert [numbers(b) for b in first] != [numbers(b) for b in other]
    plain = take(6, Numbered(10), 5, seed=0, flip=False)
    assert [numbers(b) for b in first] == [numbers(b) for b in plain]  # the order does not depend on flip
    assert not any(any(mirrored(b)) for b in plain)
    flips = {}
    for step, batch in enumerate(take(400, Numbered(10), 5, seed=0)):
        flips.update({(step // 2, n): m for n, m in zip(numbers(batch), mirrored(batch))})
    assert len(flips) == 2000 and abs(sum(flips.values()) - 1000) < 120
    assert len({tuple(flips[e, n] for e in range(200)) for n in range(10)}) == 10


def test_mirroring_belongs_to_epoch_and_image_not_to_the_batch():
    def drawn(batch_size):
        batch = torch.cat(take(60 // batch_size, Numbered(10), batch_size, seed=3))
        return list(zip(numbers(batch), mirrored(batch)))

    assert drawn(5) == drawn(12) == drawn(60)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_each_global_batch(world_size):
    whole = take(5, Numbered(10), 6, seed=2, seen=6)
    parts = [take(5, Numbered(10), 6, seed=2, seen=6, rank=r, world_size=world_size) for r in range(world_size)]
    for batch, shares in zip(whole, zip(*parts)):
        assert torch.equal(batch, torch.cat(shares))


def test_numbers_of_latents_are_shared_alike():
    whole = take(5, Numbered(10), 6, seed=2, seen=6, flip=False)
    parts = [index_batches(10, 6, seed=2, seen=6, rank=r, world_size=2) for r in range(2)]
    for batch, *shares in zip(whole, *parts):
        assert torch.cat(shares).tolist() == numbers(batch)


@pytest.mark.parametrize("in_memory", [False, True])
def test_workers_change_nothing(in_memory):
    dataset = Numbered(10, in_memory=in_memory)
    alone, helped = (take(7, dataset, 4, seed=5, seen=8, num_workers=w) for w in (0, 2))
    streamed = take(7, Numbered(10), 4, seed=5, seen=8)
    for batch in (alone, helped):
        assert all(torch.equal(a, b) for a, b in zip(batch, streamed, strict=True))


def test_no_global_random_numbers_are_used():
    state = torch.get_rng_state()
    take(2, Numbered(10), 4, seed=5, num_workers=1)
    list(sequential(Numbered(4), 2))
    assert torch.equal(state, torch.get_rng_state())


def test_one_epoch_of_images_counts_evenly_in_memory():
    functions = FunctionImages(0, 5, (6, 8))
    batch = next(batches(functions, 15, seed=0, flip=False))
    counts = Counter(next(i for i in range(5) if torch.equal(image, functions[i])) for image in batch)
    assert counts == {i: 3 for i in range(5)}


@pytest.mark.parametrize("workers", [0, 2])
def test_sequential(workers):
    found = list(sequential(Numbered(7), 3, num_workers=workers))
    assert [numbers(b) for b in found] == [[0, 1, 2], [3, 4, 5], [6]]
    assert not any(any(mirrored(b)) for b in found)
    assert all(all(mirrored(b)) for b in sequential(Numbered(7), 3, flip=True, num_workers=workers))
    assert [numbers(b) for b in sequential(Numbered(7), 2, indices=range(1, 7, 2))] == [[1, 3], [5]]
    assert list(sequential(Numbered(7), 2, indices=[])) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_faults_stay_one_line(workers):
    with pytest.raises(ValueError) as caught:
        list(sequential(Numbered(7, broken=4), 3, num_workers=workers))
    assert str(caught.value) == "data.root_dir: image 4 cannot be decoded"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d: batches(d, 0, seed=0), "train.batch_size is 0"),
        (
            lambda d: batches(d, 5, seed=0, world_size=2),
            "train.batch_size is 5; accepted: multiples of the 2 processes",
        ),
        (lambda d: batches(d, 4, seed=0, rank=2, world_size=2), "rank: 2; accepted: 0 to 1"),
        (lambda d: batches(d, 4, seed=0, seen=-1), "seen: -1"),
        (lambda d: sequential(d, 0), "batch_size is 0"),
    ],
)
def test_bad_arguments_are_refused_at_once(call, message):
    with pytest.raises(ValueError, match=message):
        call(Numbered(4))
