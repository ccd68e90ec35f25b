"""Which tiles an image is cut into, by their sizes and by memory."""

import random
from itertools import pairwise

import pytest
import torch

from ssaseg.cli.scoring.inference import windows
from ssaseg.cli.tiling import planning
from ssaseg.cli.tiling.planning import BUDGET, GRID, HOST, Memory, Tiling, choose
from ssaseg.datasets import DataError

CPU = torch.device("cpu")


@pytest.mark.parametrize("blend", [False, True])
def test_cores_are_a_partition_and_have_their_margin(blend: bool) -> None:
    draw = random.Random(0)
    for _ in range(300):
        side = draw.randint(32, 700)
        overlap = draw.randint(0, side - 1)
        length = draw.randint(1, 3000)
        cuts = Tiling(side, side, overlap, blend).cuts(length, side)
        assert [pixel for cut in cuts for pixel in range(length)[cut.core]] == [*range(length)]
        for before, after in pairwise(cuts):
            assert before.window.stop - before.core.stop >= overlap // 2
            assert after.core.start - after.window.start >= overlap // 2
        for cut in cuts:
            assert 0 <= cut.window.start <= cut.core.start < cut.core.stop <= cut.window.stop <= length
            size = cut.window.stop - cut.window.start
            assert size == min(side, length) or (not blend and side < size < side + GRID and cut is cuts[-1])


def test_tiles_begin_on_the_grid_of_the_networks() -> None:
    starts = [cut.window.start for cut in Tiling(512, 512, 100).cuts(20_000, 512)]
    assert all(start % GRID == 0 for start in starts)
    assert {after - before for before, after in pairwise(starts[:-1])} == {384}


def test_blended_tiles_are_the_sliding_windows() -> None:
    for length in (100, 512, 513, 2049):
        cuts = Tiling(512, 512, 171, blend=True).cuts(length, 512)
        assert [cut.window for cut in cuts] == windows(length, 512, 341)


def memory(network: str = "seaformer_t", classes: int = 19) -> Memory:
    return Memory(network, classes, 3, 1.0, CPU)


def test_auto_takes_the_whole_image_if_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "free_memory", lambda: 8 * 2**30)
    assert choose((1000, 1500), None, None, False, memory()).count(1000, 1500) == 1
    tiling = choose((20_000, 20_000), None, None, False, memory())
    assert (tiling.width, tiling.height, tiling.overlap) == (640, 640, 160)
    taken = memory().network_bytes(640 * 640) + memory().host_bytes(20_000, 640, False) + HOST
    assert taken <= BUDGET < memory().network_bytes(768 * 768) + memory().host_bytes(20_000, 768, False) + HOST


def test_auto_knows_of_attention_and_of_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "free_memory", lambda: 8 * 2**30)
    assert choose((3000, 2000), None, None, False, memory("cgrseg_t")).width < 2000
    monkeypatch.setattr(planning, "free_memory", lambda: 2**30)
    assert choose((3000, 2000), None, None, False, memory()).width == 384
    monkeypatch.setattr(planning, "free_memory", lambda: 2**27)
    with pytest.raises(DataError, match="no tiles of --tile auto fit into 64 MiB\ngive their size"):
        choose((3000, 2000), None, None, False, memory())


def test_auto_blends_in_tiles_that_are_not_high(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of a row of tiles are in memory: of 19 classes, 20,000 x 256 pixels are 371 MiB."""
    monkeypatch.setattr(planning, "free_memory", lambda: 8 * 2**30)
    assert choose((20_000, 20_000), None, None, True, memory()).width == 256
    with pytest.raises(DataError, match="leave out --blend"):
        choose((20_000, 200_000), None, None, True, memory(classes=150))
