"""Shared test settings: two threads at most, so that the suite times alike on laptops and servers."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))
