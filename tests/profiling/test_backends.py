"""Back ends: rows, what is not there, and processes that die."""

import multiprocessing
import os
import signal
from typing import Any

import numpy as np
import pytest
import torch

from ssaseg.cli.engine.opening import Opened
from ssaseg.cli.errors import CommandError
from ssaseg.cli.profiling import backends
from ssaseg.cli.profiling.backends import Order, Way, measure_backends, measure_way, ways_of
from ssaseg.cli.profiling.tables import print_backends

CPU = torch.device("cpu")
FOLDED = Way("torch", "float32", "folded")


def order(way: Way = FOLDED) -> Order:
    pixels = np.random.default_rng(0).standard_normal((1, 3, 64, 64), np.float32)
    return Order("seaformer_t", ("ssa",), 5, way, pixels, (64, 64), "cpu", 1, 1)


def test_a_row_of_the_folded_network() -> None:
    row = measure_way(order())
    assert row["same_labels"] > 0.99
    assert row["build_s"] > 0
    assert row["ratio"] > 0
    assert 0 < row["network_ms"]["p50"] <= row["network_ms"]["p90"]
    assert row["peak_mib"] is None or row["peak_mib"] >= row["libraries_mib"] > 50


def test_other_labels_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    build = backends.build

    def opposite(opened: Opened, way: Way, device: torch.device) -> Any:
        run = build(opened, way, device)
        return (lambda pixels: -run(pixels)) if way == FOLDED else run

    monkeypatch.setattr(backends, "build", opposite)
    assert measure_way(order())["same_labels"] < 0.5


def test_ways_are_those_of_the_device(network: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "has_compiler", lambda device: False)
    for half in (False, True):
        monkeypatch.setattr(backends, "has_bfloat16", lambda device, half=half: half)
        names = [way.name for way in ways_of(network, CPU)]
        assert names[:2] == ["torch, exact, float32", "torch, folded, float32"]
        assert ("torch, folded, bf16" in names) == ("openvino, bf16" in names) == half
        assert "onnxruntime, float32" in names
        assert not any("compiled" in name for name in names)
    with pytest.raises(CommandError, match="only onnx runs this file"):
        ways_of(network._replace(model=None, kind="onnx"), CPU)


def own_end(order: Order) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def own_error(order: Order) -> dict[str, Any]:
    raise CommandError("openvino is not installed\npip install openvino")


def own_bug(order: Order) -> dict[str, Any]:
    raise ValueError("first line\nsecond line")


def own_answer(order: Order) -> dict[str, Any]:
    return {"ratio": float(order.threads), "pid": os.getpid()}


def test_a_process_that_dies_is_a_row_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")  # a new interpreter takes seconds
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: context)
    found = []
    for function in (own_answer, own_end, own_error, own_bug):
        monkeypatch.setattr(backends, "measure_way", function)
        found += list(measure_backends([order()]))
    answer, end, error, bug = found
    assert answer["name"] == "torch, folded, float32"
    assert (answer["ratio"], answer["pid"] != os.getpid()) == (1.0, True)
    assert "killed" in end["failed"]
    assert error["failed"] == "openvino is not installed; pip install openvino"
    assert bug["failed"] == "first line"


def test_the_table_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "name": "torch",
        "network_ms": {"p50": 2.0, "p90": 3.0},
        "ratio": 1.25,
        "same_labels": 0.9987,
        "build_s": 0.5,
    }
    rows = [row | {"peak_mib": None, "libraries_mib": None}, {"name": "openvino", "failed": "pip install openvino"}]
    print_backends("ssa", rows)
    out = capsys.readouterr().out
    for said in ("2.00 / 3.00", "1.25x", "99.870 %", "not measured: openvino: pip install openvino"):
        assert said in out
