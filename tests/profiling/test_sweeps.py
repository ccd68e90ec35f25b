"""Batch sizes and threads."""

import pytest
import torch
from torch import Tensor

from ssaseg.cli.errors import CommandError
from ssaseg.cli.profiling import profile as profiling
from ssaseg.cli.profiling.profile import require_threads
from ssaseg.cli.profiling.sweeps import measure_sweep
from ssaseg.cli.scoring.engines import Logits

CPU = torch.device("cpu")


class Limited:
    """An engine that holds at most `most` images, and notes what it gets."""

    what, device, channels, num_classes, has_coarse, gives_scores = "limited", CPU, 3, 2, False, False
    takes = "normalized"

    def __init__(self, most: int = 99) -> None:
        self.most, self.seen = most, set[tuple[int, int]]()

    def logits(self, pixels: Tensor, coarse: bool = False) -> Logits:
        self.seen.add((torch.get_num_threads(), len(pixels)))
        if len(pixels) > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return Logits(pixels[:, :2], None)


def test_every_number_of_threads_with_every_batch() -> None:
    engine = Limited()
    rows = measure_sweep(lambda: engine, torch.zeros(1, 3, 32, 32), [2, 1], [1, 2], 2)
    assert [(row["threads"], row["batch"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert engine.seen == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert torch.get_num_threads() == 1
    for row in rows:
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["batch_ms"]["p50"])
        assert row["peak_mib"] is None


def test_a_batch_beyond_memory_is_a_row_and_no_larger_one_is_tried() -> None:
    engine = Limited(most=1)
    rows = measure_sweep(lambda: engine, torch.zeros(1, 3, 32, 32), [1, 2, 4], [1], 1)
    assert ["failed" in row for row in rows] == [False, True, True]
    assert (1, 4) not in engine.seen


def test_other_errors_are_raised() -> None:
    class Broken(Limited):
        def logits(self, pixels: Tensor, coarse: bool = False) -> Logits:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        measure_sweep(Broken, torch.zeros(1, 3, 32, 32), [1], [1], 1)


def test_more_threads_than_cores_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "count_cores", lambda: 2)
    require_threads([1, 2], CPU)
    with pytest.raises(CommandError, match="--threads 3: this process may use 2 cores"):
        require_threads([1, 3], CPU)
    with pytest.raises(CommandError, match="add --device cpu"):
        require_threads([1], torch.device("cuda"))
