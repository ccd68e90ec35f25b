"""A run that is killed, again and again and in the middle of its saves, ends with the bits of an undisturbed one."""

import json
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from changes import command, killed_at
from forked import Forked
from safetensors.torch import load_file
from tiny import TINY

from ssaseg.models.checkpoint import read_checkpoint

# Micro-batches, dropout, drop path, an average, clipping: whatever could make a resumed run differ. Saves at each step.
KEYS = [
    *TINY, "optim.grad_clip=1", "optim.ema=0.9", "train.steps=4", "train.workers=0", "train.log_every=1",
    "train.eval_every=2", "train.save_every=1",
]  # fmt: skip
LONG = "train.steps=18"  # which ten kills do not reach the end of

FAULTS = [
    "in mid step", "state half written", "state not yet renamed", "state without its last", "old state not yet dropped",
    "while evaluating", "evaluated, not yet saved", "clock", "clock", "clock",
]  # fmt: skip


def attempt(out: Path, *words: str, fault: str = "", times: float = 1) -> int:
    """Exit code of `ssaseg train` on the tiny recipe.

    It is killed where `fault` comes by for the `times`th time; "clock": `times` seconds after its first save, from
    outside; no fault: left alone.
    """
    before = {path.name for path in out.glob("state-*.pt")}
    changes = [] if fault in ("", "clock") else [partial(killed_at, fault, int(times))]
    given = ["train", "demo", *KEYS, "--device", "cpu", "--out", str(out), *words]
    process = Forked(command, given, *changes, errors=out.parent / "errors")
    if fault == "clock":
        process.wait_until(lambda: not {path.name for path in out.glob("state-*.pt")} <= before)
        time.sleep(times)
        process.kill()
    return process.wait()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert attempt(out) == 0, (out.parent / "errors").read_text()
    return out


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("long") / "run"
    assert attempt(out, LONG) == 0, (out.parent / "errors").read_text()
    return out


def equal(first: Any, second: Any) -> bool:
    """Whether nested containers hold the same values and, bit for bit, the same tensors."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def log(out: Path) -> list[dict[str, Any]]:
    """The records of a run, without what a clock measured."""
    clocks = {"images_per_s", "data_wait", "eval_seconds"}
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in clocks} for line in lines]


@pytest.mark.slow
def test_ten_kills_change_no_bit(long_run: Path, tmp_path: Path) -> None:
    draw = random.Random(1)
    out = tmp_path / "run"
    for number, fault in enumerate(draw.sample(FAULTS, len(FAULTS))):
        times = draw.uniform(0, 0.05) if fault == "clock" else draw.randint(1, 2)
        code = attempt(out, LONG, *["--resume"][:number], fault=fault, times=times)
        assert code == -signal.SIGKILL, (fault, (tmp_path / "errors").read_text()[-2000:])
    assert attempt(out, LONG, "--resume") == 0, (tmp_path / "errors").read_text()[-2000:]

    names = {path.name for path in long_run.iterdir()}
    assert {path.name for path in out.iterdir()} == names, "nothing lacks, nothing half written is left"
    assert {"state-17.pt", "state-18.pt", "last.safetensors", "best.safetensors"} <= names
    for name in ("last", "best"):
        assert equal(load_file(out / f"{name}.safetensors"), load_file(long_run / f"{name}.safetensors")), name
    states = [torch.load(folder / "state-18.pt", weights_only=True) for folder in (out, long_run)]
    assert "ema" in states[0]["extra"]
    assert equal(*states)
    assert log(out) == log(long_run)
    assert len(json.loads((out / "env.json").read_text())["resumed"]) > 3


def test_a_newest_state_that_cannot_be_read_costs_its_steps_alone(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    newest = out / "state-4.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    (out / "last.safetensors").unlink()
    assert attempt(out, "--resume") == 0
    told = [line for line in (tmp_path / "errors").read_text().splitlines() if "cannot be read" in line]
    assert len(told) == 1
    assert "continuing from the last good state, state-3.pt" in told[0]
    assert (out / "state-4.pt.unreadable").exists()
    assert equal(load_file(out / "last.safetensors"), load_file(undisturbed / "last.safetensors"))
    assert log(out) == log(undisturbed)


def test_last_belongs_to_the_state(undisturbed: Path, tmp_path: Path) -> None:
    """Also where the very last kill came between the two, and nothing is left to train."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    (out / "last.safetensors").unlink()
    assert attempt(out, "--resume") == 0
    assert equal(*(read_checkpoint(folder / "last.safetensors") for folder in (out, undisturbed)))
