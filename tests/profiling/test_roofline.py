"""Bounds by hand, and that nothing slow is measured for them."""

import pytest
import torch
from torch import nn

from ssaseg.cli.engine.opening import Opened, make_engine
from ssaseg.cli.profiling import roofline as module
from ssaseg.cli.profiling.counting import EVERY_OPERATION, count
from ssaseg.cli.profiling.roofline import Work, least, reached, roofline, stage_bounds
from ssaseg.cli.profiling.scene import Picture
from ssaseg.cli.profiling.stages import Pass

CPU = torch.device("cpu")
SPEED = {"float32 operations/s": 1e9, "bfloat16 operations/s": 4e9, "cache bytes/s": 1e6, "memory bytes/s": 1e5}


def test_operations_and_bytes_by_hand() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1, bias=False).requires_grad_(False)
    image = torch.zeros(1, 4, 10, 20)
    with torch.no_grad(), Work() as work:
        maps = layer(image)
        maps.view(-1)
        maps.relu_()
        maps + maps
    read, made = 4 * image.numel(), 4 * maps.numel()
    assert work.products == [(10 * 20 * 6 * 4 * 9, read + 4 * 6 * 4 * 9 + made)]
    assert work.others == [(0, 2 * made), (0, 3 * made)]  # relu_ and the sum; the view moves nothing


def test_the_slower_of_arithmetic_and_bytes_counts() -> None:
    assert least([(1000, 4)], pace=2e6, copy=4e6) == pytest.approx(1.0)  # 2000 operations at 2 million a second
    assert least([(1000, 40000)], pace=2e6, copy=4e6) == pytest.approx(10.0)
    assert least([(1000, 4), (0, 8000)], pace=2e6, copy=4e6) == pytest.approx(3.0)


def test_bounds_of_a_network() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU()).requires_grad_(False)
    found = roofline(model, torch.zeros(1, 3, 8, 8), SPEED)
    moved = 4 * 64 * (3 + 8) + 4 * 24
    assert found["GMAC"] == {"convolution": 64 * 24 / 1e9}
    assert found["MB"]["products, with weights"] == moved / 1e6
    bounds = found["at least [ms]"]
    assert bounds["products, float32"] == pytest.approx(1e3 * moved / 1e6)
    assert bounds["products, bfloat16"] == pytest.approx(bounds["products, float32"] / 2)
    assert bounds["all, float32"] == pytest.approx(1e3 * (moved + 4 * 64 * 16) / 1e6)


def test_the_stages_add_up_to_the_network(network: Opened, picture: Picture) -> None:
    one = Pass(make_engine(network, CPU), network.metadata, picture)
    times = {"backbone": 8.0, "decoder": 4.0, "classifier": 2.0}
    *rows, last = stage_bounds(one, SPEED, times)
    assert [row["stage"] for row in rows] == list(times)
    for key in ("gmacs", "operations", "mb", "least_ms", "products_ms", "ms"):
        assert last[key] == pytest.approx(sum(row[key] for row in rows))
        assert last[key] > 0
    assert last["ratio"] == pytest.approx(14.0 / last["least_ms"])
    assert network.model is not None
    pixels = picture.prepare(picture.image, network.metadata, CPU)
    assert last["gmacs"] == pytest.approx(count(network.model, pixels)["gmacs"][EVERY_OPERATION])


@pytest.mark.parametrize("fast", [True, False])
def test_emulated_bfloat16_is_measured_on_small_matrices(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = []
    monkeypatch.setattr(module, "has_bfloat16", lambda device: fast)
    monkeypatch.setattr(module, "SIDES", {"cpu": 256})
    monkeypatch.setattr(module, "CACHED", {"cpu": 64})
    monkeypatch.setattr(torch, "ones", lambda size, device: torch.zeros(64))
    random = torch.randn

    def note(*shape: int, device: torch.device) -> torch.Tensor:
        sides.append(shape[0])
        return random(8, 8)

    monkeypatch.setattr(torch, "randn", note)
    assert all(value > 0 for value in reached(1).values())
    assert sides == [256, 256 if fast else 128]
