"""`--gpus N`: places, signals and exit codes, with processes that only sleep."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner

from ssaseg.cli.device import select_device
from ssaseg.cli.errors import CommandError
from ssaseg.cli.main import cli
from ssaseg.cli.ranks import launcher as launch
from ssaseg.cli.ranks.ranks import connect


def launched(monkeypatch: pytest.MonkeyPatch, script: str, wish: int | None = None) -> int:
    """`run_launch` of two processes that run `script`; the command gets the signal `wish` half a second later."""
    command = [sys.executable, "-c", f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{script}"]
    monkeypatch.setattr(launch, "own_command", lambda: command)
    before = set(psutil.Process().children(recursive=True))  # what other tests have left ready
    timer = threading.Timer(0.5, os.kill, (os.getpid(), wish or 0))
    timer.start()
    try:
        return launch.run_launch(2)
    finally:
        timer.join()
        assert set(psutil.Process().children(recursive=True)) <= before


def test_launcher_is_for_more_than_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [launch.needs_ranks(gpus) for gpus in (None, 1, 2)] == [False, False, True]
    monkeypatch.setenv("RANK", "0")
    assert not launch.needs_ranks(None)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not launch.needs_ranks(2)  # torchrun's
    with pytest.raises(CommandError, match=r"--gpus 8: RANK is set.*: 2\n"):
        launch.needs_ranks(8)
    monkeypatch.setenv(launch.LAUNCHED, "1")
    assert not launch.needs_ranks(8)


def test_one_process_of_a_job_system_is_not_taken_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert not launch.needs_ranks(1)
    result = CliRunner().invoke(cli, ["train", "demo", "--gpus", "8", "--device", "cpu", "--dry-run"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --gpus 8: RANK is set")


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"RANK": "x"}, "RANK=x"),
        ({"WORLD_SIZE": "9" * 99}, "WORLD_SIZE=999"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
        ({"RANK": "2"}, "a smaller rank"),
        ({"MASTER_ADDR": "localhost"}, "MASTER_PORT"),
        ({launch.LAUNCHED: "/nowhere"}, "unset it"),
        ({launch.LAUNCHED: "/"}, "unset it"),
        ({launch.LAUNCHED: ""}, "unset it"),
    ],
)
def test_an_environment_that_nobody_has_made_for_ranks(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], told: str
) -> None:
    """It would end in a traceback, or wait for half an hour."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CommandError, match=told) as found:
        connect(torch.device("cpu"))
    assert str(found.value).count("\n") == 2


def test_a_folder_of_ranks_without_a_rank_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(launch.LAUNCHED, "/nowhere")
    monkeypatch.delenv("RANK", raising=False)
    assert select_device("auto").type == "cpu"


def test_gpus_without_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto").type == "cpu"
    monkeypatch.setenv(launch.LAUNCHED, "1")
    monkeypatch.setenv("RANK", "0")
    assert select_device("cpu").type == "cpu"
    with pytest.raises(CommandError, match=r"--gpus: PyTorch finds no GPU\nuse --device cpu"):
        select_device("auto")


def test_ranks_import_nothing_from_the_current_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise SystemExit('the wrong click')")
    monkeypatch.setattr(sys, "argv", ["ssaseg", "--version"])
    done = subprocess.run(launch.own_command(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ssaseg, version ")


def test_launcher_gives_places_and_returns_zero(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "tmp").mkdir()
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", launch.LAUNCHED, "OMP_NUM_THREADS"]
    write = (
        f"folder = os.environ[{launch.LAUNCHED!r}]\n"
        "facts = [os.stat(folder).st_mode & 0o777, len(open(folder + '/secret', 'rb').read())]\n"
        f"place = [os.environ[name] for name in {names}]\n"
        f"open({str(tmp_path)!r} + '/' + str(rank), 'w').write(repr([*place, *facts, 'MASTER_PORT' in os.environ]))"
    )
    assert launched(monkeypatch, write) == 0
    found = [eval((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    assert [place[:4] for place in found] == [[str(rank), str(rank), "2", "2"] for rank in (0, 1)]
    assert found[0][4:] == found[1][4:]
    assert found[0][5:] == [str(max(len(os.sched_getaffinity(0)) // 2, 1)), 0o700, 32, False]
    assert [*(tmp_path / "tmp").iterdir()] == [], "the folder where they met is left"


def test_launcher_ends_the_others_and_has_the_first_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.2)
    assert launched(monkeypatch, "sys.exit(3) if rank else time.sleep(60)") == 3
    with pytest.raises(CommandError, match="killed from outside: rank 1 by SIGKILL, of 2 ranks"):
        launched(monkeypatch, "os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(60)")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_launcher_passes_a_signal_on_once(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, tmp_path: Path
) -> None:
    heed = f"""
told = []
signal.signal({int(number)}, lambda *_: told.append(1))
end = time.monotonic() + 60
while not told and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.3)
open({str(tmp_path)!r} + f'/{{rank}}', 'w').write(str(len(told)))
sys.exit({128 + number})
"""
    assert launched(monkeypatch, heed, number) == 128 + number
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["1", "1"]
    # Nor does one that has not learnt to heed it make another code of it.
    assert launched(monkeypatch, "time.sleep(60)", number) == 128 + number
    # A numerical failure in the same moment is told as such.
    assert launched(monkeypatch, heed.replace(f"sys.exit({128 + number})", "sys.exit(3)"), number) == 3
