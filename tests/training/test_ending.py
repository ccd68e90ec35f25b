"""How a run ends that is stopped, or whose disk or data give way: with what was learnt, and in a few lines."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import changes
import pytest
from click.testing import CliRunner
from forked import Forked
from tiny import TINY

from ssaseg.cli.errors import CommandError
from ssaseg.cli.main import cli
from ssaseg.cli.signals import StopSignal
from ssaseg.cli.training import build as jobs
from ssaseg.cli.training import log
from ssaseg.cli.training import loop as train
from ssaseg.cli.training.faults import explain_file_error
from ssaseg.cli.training.job import Job
from ssaseg.cli.training.log import MetricsLog, read_log
from ssaseg.cli.training.window import Window
from ssaseg.files.writing import write_atomic

MakeJob = Callable[..., Job]

pytestmark = pytest.mark.usefixtures("one_thread")


def run(job: Job) -> int:
    return train.train(job, Window(job, bar=False))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_step_leaves_nothing(tmp_path: Path, number: int, code: int) -> None:
    out = tmp_path / "run"
    words, began = ["train", "demo", *TINY, "--device", "cpu", "--out", str(out)], tmp_path / "began"
    change = partial(changes.waiting_for_labels, began)
    process = Forked(changes.command, words, change, errors=tmp_path / "errors")
    process.wait_until(began.exists)
    assert (out / ".lock").exists()
    process.send_signal(number)
    ended, errors = process.finish()
    assert (ended, errors.strip()) == (code, "stopped")
    assert not out.exists()


def test_further_ctrl_c_after_saving_prints_no_traceback(tmp_path: Path) -> None:
    out = tmp_path / "run"
    change = changes.interrupted_in_step_2_and_on_and_on
    script = [sys.executable, changes.__file__, change.__name__]  # forked processes end otherwise than a user's
    command = [*script, "train", "demo", *TINY, "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == "stopped after step 2; state saved, continue with --resume"
    assert (out / "state-2.pt").exists()


def test_signals_are_not_heeded_once_all_is_saved() -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    stop = StopSignal()
    try:
        with stop:
            signal.raise_signal(signal.SIGINT)
            stop.saved = True
            signal.raise_signal(signal.SIGINT)  # in an evaluation, say: its state is on the disk
            stop.saved = False
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # a third one
            stop.ignore_signals()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert stop.exit_code == 130
    finally:
        for each, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(each, handler)


def test_a_full_disk_costs_lines_of_the_log_alone(
    tmp_path: Path, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full for two lines, the first of which is written in part."""
    job = make_job(tmp_path, "train.log_every=1", "train.steps=4")
    path, real, opened = tmp_path / "metrics.jsonl", log.open_append, []

    def full(path: Path) -> Any:
        opened.append(1)
        if len(opened) in (2, 3):
            if len(opened) == 2:
                with real(path) as file:
                    file.write('{"step": 2, "lo')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path)

    monkeypatch.setattr(log, "open_append", full)
    assert run(job) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line]
    assert told == [
        f"warning: {path}: No space left on device; until this is fixed, lines of the log are lost; training continues"
    ]
    records, damaged = read_log(path)
    assert [record["step"] for record in records if "loss" in record] == [1, 4]
    assert damaged == 1
    MetricsLog(path, 4, 4)
    assert capsys.readouterr().err == f"warning: {path}: 1 line cannot be read and will be removed from the file\n"


def test_a_disk_that_is_full_at_the_start_is_told_with_a_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    result = CliRunner().invoke(cli, ["train", "demo", *TINY, "--device", "cpu", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    told = result.stderr[result.stderr.index("error: ") :].splitlines()
    assert "config.yaml: No space left on device (" in told[0]
    assert "0.0 MiB" not in told[0]
    assert told[1:] == ["free some space on that disk, then run the command again"]
    assert not (tmp_path / "run").exists()


def test_how_much_was_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    for size, words in ((1500, "1500 bytes"), (2**21, "2.0 MiB")):
        with pytest.raises(OSError, match=rf"\({words} to write"):
            write_atomic(tmp_path / "file", bytes(size))


def test_a_start_that_is_missing_is_told_before_labels_are_looked_at(
    tmp_path: Path, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "check_labels", lambda *_: pytest.fail("looked at labels"))
    with pytest.raises(CommandError, match=r"model.pretrained=none.pth: no such checkpoint\ndownload it to this path"):
        make_job(tmp_path, "model.pretrained=none.pth")


def test_an_image_that_has_vanished_is_told_with_a_mend() -> None:
    told = str(
        explain_file_error(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "images/7.png"))
    ).splitlines()
    assert told[0] == "images/7.png: No such file or directory"
    assert told[2] == "restore it, or the disk that it is on, then continue with --resume"
    other = ValueError("damaged")
    assert explain_file_error(other) is other
