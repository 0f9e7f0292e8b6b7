"""Memory that is given out again: never while anything refers to it, and not kept for ever."""

import gc
import threading

import pytest
import torch

from models.operators.native import memory

LARGE = 3 << 20  # floats, 12 MB


@pytest.fixture(autouse=True)
def nothing_kept():
    memory.release()
    yield
    gc.collect()
    memory.release()


def test_small_tensors_are_pytorch_s_own():
    memory.empty(100, 3)
    assert memory.release() == 0


@pytest.mark.skipif(memory._MAPPED is None, reason="the system has no anonymous maps")
class TestLarge:
    def test_shape_type_and_content(self):
        x = memory.empty(3, 1 << 20)
        assert x.shape == (3, 1 << 20) and x.dtype == torch.float32 and x.is_contiguous()
        assert torch.equal(x.fill_(2.5).sum(1, dtype=torch.float64), torch.full((3,), 2.5 * (1 << 20)).double())

    def test_a_block_is_given_out_again_once_the_last_view_is_gone(self):
        x = memory.empty(LARGE)
        address, view = x.data_ptr(), x[5:].view(-1, 1)
        del x
        other = memory.empty(LARGE)
        assert other.data_ptr() != address
        del view
        assert memory.empty(LARGE).data_ptr() == address

    def test_autograd_keeps_what_it_saved(self):
        x = memory.empty(LARGE).fill_(3.0).requires_grad_()
        y = memory.empty(LARGE).fill_(2.0)
        product = x * y
        del y
        memory.empty(LARGE).fill_(-1.0)
        product.sum().backward()
        assert torch.equal(x.grad, torch.full((LARGE,), 2.0))

    def test_sizes_far_from_a_block_do_not_take_it(self):
        large, small = memory.empty(4 * LARGE), memory.empty(LARGE)
        addresses = large.data_ptr(), small.data_ptr()
        del large, small
        assert memory.empty(LARGE).data_ptr() == addresses[1]
        assert memory.empty(4 * LARGE - 5).data_ptr() == addresses[0]

    def test_blocks_that_nobody_takes_are_given_back(self, monkeypatch):
        monkeypatch.setattr(memory, "_PATIENCE", 3)
        together = [memory.empty(8 * LARGE), memory.empty(LARGE)]
        del together
        for _ in range(4):
            memory.empty(LARGE)
        assert memory.release() == 4 * LARGE

    def test_no_more_is_held_than_was_once_in_use(self):
        sizes = [LARGE, 2 * LARGE, 4 * LARGE, 8 * LARGE]
        for size in sizes * 3:  # one at a time, none of which fits another's block
            memory.empty(size)
        assert memory.release() <= 4 * 8 * LARGE
        together = [memory.empty(size) for size in sizes]
        addresses = {x.data_ptr() for x in together}
        del together
        for size in sizes:
            assert memory.empty(size).data_ptr() in addresses

    def test_release_leaves_tensors_alone(self):
        x = memory.empty(LARGE).fill_(7.0)
        assert memory.release() == 0
        assert bool((x == 7).all())

    def test_threads_never_share_a_block(self):
        failures = []

        def work(number):
            for _ in range(20):
                x = memory.empty(LARGE).fill_(number)
                if not bool((x == number).all()):
                    failures.append(number)

        threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
