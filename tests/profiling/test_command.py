"""Options of `ssaseg profile` that do not go together, and the whole report."""

import json
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from calling import call

from ssaseg.cli.profiling import profile as profiling
from ssaseg.cli.profiling.profile import run_profile
from ssaseg.cli.profiling.scene import drawn


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "got none; give one NAME or FILE"),
        (["seaformer_t", "seaformer_s"], "got 2: seaformer_t seaformer_s; give one NAME"),
        (["seaformer_t", "--batch", "1", "2"], "got 2: seaformer_t 2"),
        (["seaformer_t", "--batch", "1,x"], "whole numbers from 1 to 4096"),
        (["seaformer_t", "--batch", "0"], "whole numbers from 1"),
        (["seaformer_t", "--threads", ""], "whole numbers from 1"),
        (["seaformer_t", "--out", "x.png"], "--out is only for --scatter"),
        (["seaformer_t", "--image", __file__, "--size", "64", "64"], "either --image or --size"),
        (["seaformer_t", "--image", "gone.jpg"], "'gone.jpg' does not exist"),
        (["--scatter"], "--scatter: give run folders"),
        (["--scatter", "x", "--backends"], "--backends does not go with --scatter"),
        (["--scatter", "x", "--classes", "3"], "--classes does not go with --scatter"),
        (["--scatter", "x", "--out", "x.jpg"], "expected a file that ends in .png"),
        (["--paper-table", "seaformer_t"], "NAME|FILE does not go with --paper-table"),
        (["--paper-table", "--scatter"], "--scatter does not go with --paper-table"),
        (["--paper-table", "--threads", "1"], "--threads does not go with --paper-table"),
    ],
)
def test_options_that_do_not_go_together(words: list[str], said: str) -> None:
    result = call("profile", *words)
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.strip().splitlines()) <= 3


def test_the_whole_report(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every table is printed, and its figures are those of the JSON."""
    speed = {"float32 operations/s": 1e11, "bfloat16 operations/s": 1e11, "cache bytes/s": 1e10, "memory bytes/s": 1e10}
    monkeypatch.setattr(profiling, "reached", lambda device: speed)
    monkeypatch.setattr(
        profiling, "measure_backends", lambda orders: [{"name": o.way.name, "failed": "x"} for o in orders]
    )
    image, file = tmp_path / "photo.png", tmp_path / "report.json"
    cv2.imwrite(str(image), drawn((100, 100), 3))
    how: dict[str, Any] = {"image": image, "roofline": True, "backends": True, "batches": (1, 2), "threads": (1,)}
    assert run_profile(str(checkpoint), [], None, (512, 512), str(file), "cpu", 1, **how) == 0
    out = capsys.readouterr().out
    report = json.loads(file.read_text())
    (column,) = report["columns"]
    assert report["size"] == [64, 64]  # by the protocol of the checkpoint
    assert (column["engine"], column["exact"]["engine"]) == ("torch, folded, float32", "torch, exact, float32")
    assert column["peak_mib"] < 1.2 * column["exact"]["peak_mib"]
    for key in ("network_ms", "post_ms"):
        assert column[key]["p50"] > 0
    rows = column["stages"]["rows"]
    assert [row["stage"] for row in rows][2:5] == ["backbone", "decoder", "classifier"]
    assert [row["batch"] for row in column["sweep"]] == [1, 2]
    assert all(row["peak_mib"] > 1 for row in column["sweep"])
    assert column["roofline"][-1]["stage"] == "all"
    assert column["backends"][0]["name"] == "torch, exact, float32"
    assert "photo.png, 100x100 pixels" in report["image"]
    for said in (*(f"{row['ms']:.2f}" for row in rows), f"{column['stages']['whole_ms']:.2f}", "roofline", "images/s"):
        assert said in out, said
    assert "not measured: torch, exact, float32: x" in out


def test_a_size_beyond_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(profiling, "measure", full)
    result = call("profile", "seaformer_t", "--size", "64", "64", "--device", "cpu")
    assert result.exit_code == 2
    assert "not enough memory for a drawn scene of 64x64 pixels" in result.output
    assert "smaller --size" in result.output


def test_the_speeds_are_measured_only_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profiling, "reached", None)
    assert run_profile("seaformer_t", ["ssa"], 3, (32, 32), "-", "cpu", 1) == 0
    (column,) = json.loads(capsys.readouterr().out)["columns"]
    assert not {"roofline", "sweep", "backends"} & column.keys()
    assert torch.get_num_threads() == 1


def test_classes_are_a_number_for_a_name_and_names_for_a_file(checkpoint: Path) -> None:
    for words, said in (
        (["seaformer_t", "--classes", "9" * 5000], "--classes"),
        (["seaformer_t", "--classes", "a,b"], "--classes a,b is for a file that does not say it"),
        (["seaformer_t", "--protocol", "demo"], "--protocol is for a file that does not say it"),
        ([checkpoint, "--classes", "a,b"], "says its classes and protocol itself"),
    ):
        result = call("profile", *words, "--device", "cpu")
        assert (result.exit_code, said in result.output) == (2, True), result.output[:300]
