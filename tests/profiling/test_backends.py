"""Back ends: rows, what is not there, and processes that die."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ssaseg.cli.engine.opening import Opened
from ssaseg.cli.errors import CommandError
from ssaseg.cli.profiling import backends
from ssaseg.cli.profiling.backends import Order, Way, measure_backends, measure_way, serve, ways_of
from ssaseg.cli.profiling.tables import print_backends

CPU = torch.device("cpu")
FOLDED = Way("torch", "float32", "folded")


def order(way: Way = FOLDED) -> Order:
    return Order("seaformer_t", ("ssa",), 5, None, way, None, (64, 64), "cpu", 1, 1)


def test_a_row_of_the_folded_network() -> None:
    row = measure_way(order())
    assert row["same_labels"] > 0.99
    assert row["build_s"] > 0
    assert row["ratio"] > 0
    assert 0 < row["network_ms"]["p50"] <= row["network_ms"]["p90"]
    assert row["peak_mib"] is None or row["peak_mib"] >= row["before_mib"] > 50


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


def test_a_process_that_dies_is_a_row_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """With other programs, as one that imports PyTorch takes seconds."""
    found = []
    for program in (
        """import json, sys; open(sys.argv[2], "w").write(json.dumps({"order": json.loads(sys.argv[1])}))""",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "raise SystemExit(3)",
    ):
        monkeypatch.setattr(backends, "PROGRAM", program)
        found += list(measure_backends([order()]))
    answer, killed, left = found
    assert answer["name"] == "torch, folded, float32"
    assert answer["order"][:5] == ["seaformer_t", ["ssa"], 5, None, list(FOLDED)]
    assert "killed" in killed["failed"]
    assert "exit code 3" in left["failed"]


def test_a_process_ends_with_the_one_that_started_it() -> None:
    source = "import os, sys\nexec(sys.argv[1])\nThread(target=_end_with_stdin, daemon=True).start(); time.sleep(60)"
    code = "import time\nfrom threading import Thread\n" + inspect.getsource(backends._end_with_stdin)
    process = subprocess.Popen([sys.executable, "-c", source, code], stdin=subprocess.PIPE)
    process.communicate()  # closes it
    assert process.returncode == 1


def test_an_order_survives_json_and_errors_are_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    monkeypatch.setattr(backends, "_end_with_stdin", lambda: None)
    for error in (None, CommandError("openvino is not installed\npip install openvino"), ValueError("first\nsecond")):

        def measure(got: Order, error: Exception | None = error) -> dict[str, Any]:
            assert got._replace(classifiers=tuple(got.classifiers), size=(64, 64)) == order()
            if error:
                raise error
            return {"ratio": 2.0}

        monkeypatch.setattr(backends, "measure_way", measure)
        serve(json.dumps(order()), str(tmp_path / "answer.json"))
        answers.append(json.loads((tmp_path / "answer.json").read_text()))
    assert answers == [
        {"ratio": 2.0},
        {"failed": "openvino is not installed; pip install openvino"},
        {"failed": "first"},
    ]


def test_the_table_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "name": "torch",
        "network_ms": {"p50": 2.0, "p90": 3.0},
        "ratio": 1.25,
        "same_labels": 0.9987,
        "build_s": 0.5,
        "cached": True,
    }
    rows = [row | {"peak_mib": None, "before_mib": None}, {"name": "openvino", "failed": "pip install openvino"}]
    print_backends("ssa", rows)
    out = capsys.readouterr().out
    for said in (
        "2.00 / 3.00",
        "1.25x",
        "99.870 %",
        "0.5 (export kept)",
        "not measured: openvino: pip install openvino",
    ):
        assert said in out
