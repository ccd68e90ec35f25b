"""`predict --engine ray` on two local actors: the same results, actors that die, Ctrl-C. `make cluster` runs them.

Ray is started once for the file, by what the command starts it with.
"""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import actors
import psutil
import pytest
from predicting import files, picture, save_checkpoint, write

from ssaseg.cli import cluster
from ssaseg.cli.errors import CommandError
from ssaseg.cli.prediction import journal, ray_engine
from ssaseg.cli.prediction.predict import run_predict

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(find_spec("ray") is None, reason="the extra `ray` is not installed: `make cluster`"),
]


def processes() -> set[str]:
    """Processes of Ray below this one."""
    below = psutil.Process().children(recursive=True)
    return {each.name() for each in below if each.status() != psutil.STATUS_ZOMBIE}


@contextmanager
def helpers_for_workers() -> Iterator[None]:
    """The processes that Ray starts can import tests/helpers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(actors.__file__).parent))
        yield


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Any, str]]:
    """Ray, and the folder of its files. Nothing of it is there afterwards, and it listens on loopback only."""
    names, home = cluster._settings(local=True), Path.home() / ".ray"
    before, had_home = [os.environ.get(name) for name in names], home.exists()
    with helpers_for_workers(), cluster.connected(cluster.LOCAL) as ray:
        folder = ray._private.worker.global_worker.node.get_temp_dir_path()
        below = psutil.Process().children(recursive=True)
        ports = [each.laddr for process in below for each in process.net_connections() if each.status == "LISTEN"]
        assert ports
        assert {address.ip.removeprefix("::ffff:") for address in ports} <= {"127.0.0.1", "::1"}
        yield ray, folder
    assert [os.environ.get(name) for name in names] == before
    assert processes() == set()
    assert not os.path.exists(folder)
    assert home.exists() == had_home


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(autouse=True)
def two_actors(running: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two actors of one thread, on the Ray that runs."""

    @contextmanager
    def connected(address: str) -> Iterator[Any]:
        yield running[0]

    monkeypatch.setattr(ray_engine, "connected", connected)
    monkeypatch.setattr(ray_engine, "nodes_of", lambda ray: [cluster.Node(2, 0)])


def label(checkpoint: Path, folder: Path, out: Path, resume: bool = False, **more: Any) -> int:
    return run_predict(checkpoint, [str(folder)], out, ("index", "rle", "shares"), resume, "cpu", **more)


def manifest(out: Path) -> dict[str, dict[str, Any]]:
    """The manifest by image, without the seconds."""
    entries = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    return {entry["file"]: {**entry, "seconds": entry["seconds"] > 0} for entry in entries}


def record(out: Path) -> set[tuple[Any, ...]]:
    """The record without times."""
    lines = [json.loads(line) for line in (out / journal.RECORD).read_text().splitlines()]
    return {(key, made_of, size, code) for key, made_of, size, _, code in lines}


def test_results_are_those_of_one_process(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for index in range(9):
        write(tmp_path / "in" / ("sub" if index % 2 else "") / f"{index} é.png", picture(40 + index, 56, seed=index))
    (tmp_path / "in/broken.png").write_bytes(b"no image")
    odd = os.fsdecode(os.fsencode(tmp_path / "in/odd-") + b"\xff.png")
    os.rename(write(tmp_path / "in/odd.png", picture(seed=77)), odd)
    assert label(checkpoint, tmp_path / "in", tmp_path / "plain") == 1
    monkeypatch.chdir(tmp_path)  # relative paths mean the same in actors
    capfd.readouterr()
    assert label(checkpoint, Path("in"), Path("ray"), engine="local", actors=2) == 1
    printed = capfd.readouterr()
    assert "labelled 10 of 11 images" in printed.out
    assert "in 2 actors of Ray, 1 thread each" in printed.out
    # Nothing of Ray; on a slow machine there are lines of progress.
    (line,) = [line for line in printed.err.splitlines() if not line.startswith("labelled")]
    assert line.startswith("skipped: in/broken.png: damaged image: not an image of a known type, but text; expected a")
    plain, made = tmp_path / "plain", tmp_path / "ray"
    assert files(made) == files(plain)
    assert len(files(made)) == 12
    for name in files(plain):
        assert (made / name).read_bytes() == (plain / name).read_bytes(), name
    assert manifest(made) == manifest(plain)
    assert manifest(made)["broken.png"]["error"].startswith("damaged image")
    assert record(made) == record(plain)
    # Nothing is left to do but the broken one: with `--resume` results of Ray are results like others.
    monkeypatch.setattr(ray_engine.Run, "label", lambda run, sources: pytest.fail(f"{len(sources)} are labelled again"))
    (tmp_path / "in/broken.png").unlink()
    assert label(checkpoint, Path("in"), Path("ray"), True, engine="local") == 0


def test_actors_that_die_are_replaced(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One dies of an image that is labelled by its successor; an image that kills each of them is an error."""
    monkeypatch.setattr(ray_engine, "Actor", actors.Dying)
    for name in ("a", "b", "c", "d", "kill", "once", "x"):
        write(tmp_path / f"in/{name}.png", picture(seed=ord(name[0])))
    assert label(checkpoint, tmp_path / "in", tmp_path / "out", engine="local", actors=2) == 1
    made = manifest(tmp_path / "out")
    assert {name for name, entry in made.items() if entry["error"] is None} == {f"{each}.png" for each in "abcdx"} | {
        "once.png"
    }
    assert made["kill.png"]["error"] == "the process that labelled it died, 2 times alone with it"
    assert (tmp_path / "in/once.met").exists()
    printed = capfd.readouterr()
    assert "labelled 6 of 7 images" in printed.out
    (line,) = [line for line in printed.err.splitlines() if not line.startswith("labelled")]
    assert line.startswith(f"skipped: {tmp_path}/in/kill.png: the process that labelled it died")
    assert [path.name for path in (tmp_path / "out").rglob(".*")] == [journal.RECORD]


def test_ctrl_c_keeps_what_is_done(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for index in range(8):
        write(tmp_path / f"in/{index}.png", picture(seed=index))
    take = ray_engine.Run.take

    def interrupted(run: ray_engine.Run, *given: Any) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return take(run, *given)

    with monkeypatch.context() as patch:
        patch.setattr(ray_engine.Run, "take", interrupted)
        assert label(checkpoint, tmp_path / "in", tmp_path / "out", engine="local", actors=2) == 130
    assert "stopped: 1 of 8 images are done; --resume labels the rest" in capfd.readouterr().err
    assert len(manifest(tmp_path / "out")) == 1
    assert label(checkpoint, tmp_path / "in", tmp_path / "out", True) == 0  # in this process
    assert len(manifest(tmp_path / "out")) == 8


def test_errors_of_actors_end_the_command(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all images would meet: here the folder of results is not the command's, as on a node without its disk."""
    write(tmp_path / "in/a.png")
    work = ray_engine._work
    lock = str(tmp_path / "other/lock")
    monkeypatch.setattr(ray_engine, "_work", lambda *given: replace(work(*given), lock=lock))
    with pytest.raises(CommandError, match="does not see the --out of the command\nexpected a folder on a disk that"):
        label(checkpoint, tmp_path / "in", tmp_path / "out", engine="local", actors=1)
