"""What must hold before PyTorch is imported by any test."""

import os
from collections.abc import Iterator

import pytest

# As in ssaseg.cli.main: threads that spin for long make the suite many times slower on a machine that is not idle.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For images so small that they only wait for a second thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
