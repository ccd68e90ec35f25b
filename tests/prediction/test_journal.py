"""Results that know what they were made of, two commands at once, and commands that are killed."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from predicting import files, labelled_images, picture, save_checkpoint, start_other, write

from ssaseg.cli.errors import CommandError
from ssaseg.cli.prediction import journal, preparing
from ssaseg.cli.prediction.journal import RECORD, Existing, Journal, Result, exclusive, read_record
from ssaseg.cli.prediction.predict import run_predict
from ssaseg.files import writing

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def label(checkpoint: Path, folder: Path, out: Path, *save: str, skip: bool = True) -> int:
    return run_predict(checkpoint, [str(folder)], out, save or ("index",), skip, "cpu")


# ---- what a result was made of -----------------------------------------------------------------------------------
def test_results_of_something_else_are_made_again(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_checkpoint(tmp_path / "other.safetensors", "linear")
    out = tmp_path / "out"
    for folder, seed in (("A", 0), ("B", 1)):
        image = write(tmp_path / folder / "0.png", picture(seed=seed))
        os.truncate(image, 5000)  # with zeros at the end
        os.utime(image, ns=(1, 1))  # the same size and time: only the folder differs

    def labelled(model: Path, folder: str, *save: str) -> bool:
        assert label(model, tmp_path / folder, out, *save) == 0
        told = capsys.readouterr()
        made = "labelled 1 of 1" in told.out
        assert ("1 were there already" in told.out) is not made
        return made

    both = ("index", "rle")
    assert labelled(checkpoint, "A", *both)
    assert not labelled(checkpoint, "A", *both)
    assert labelled(checkpoint, "B", *both)
    assert not labelled(checkpoint, "B", *both)
    assert labelled(other, "B", *both)
    assert labelled(checkpoint, "B", "index")
    assert labelled(checkpoint, "B", "rle")  # rle.json still was the other checkpoint's
    assert not labelled(checkpoint, "B", *both)
    assert labelled(checkpoint, "B", *both, "color")
    os.utime(tmp_path / "B/0.png", ns=(2, 2))
    assert labelled(checkpoint, "B", "index")


def test_a_checkpoint_that_is_replaced_while_it_is_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in/0.png")
    model = tmp_path / "best.safetensors"
    shutil.copy(checkpoint, model)

    def replaced(path: Path) -> str:
        shutil.copy(checkpoint, tmp_path / "new")
        (tmp_path / "new").replace(path)
        return "0"

    monkeypatch.setattr(preparing, "checkpoint_sum", replaced)
    with pytest.raises(CommandError, match="replaced while it was read"):
        label(model, tmp_path / "in", tmp_path / "out")


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if how == "a link":
        path.with_name("real").write_bytes(content)
        path.symlink_to("real")
    elif how != "missing":
        path.write_bytes({"empty": b"", "cut off": content[:-1], "changed": content[:-1] + b"?"}[how])


@pytest.mark.parametrize("how", ["empty", "cut off", "changed", "a link", "missing"])
def test_a_damaged_result_is_made_again(checkpoint: Path, tmp_path: Path, how: str) -> None:
    write(tmp_path / "in/0.png")
    result = tmp_path / "out/index/0.png"
    assert label(checkpoint, tmp_path / "in", tmp_path / "out") == 0
    content = result.read_bytes()
    damage(result, how)
    assert label(checkpoint, tmp_path / "in", tmp_path / "out") == 0
    assert not result.is_symlink()
    assert result.read_bytes() == content


def test_changed_objects_are_made_again(checkpoint: Path, tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"in/{name}.png", picture(seed=ord(name)))
    path = tmp_path / "out/rle.json"
    assert label(checkpoint, tmp_path / "in", tmp_path / "out", "rle") == 0
    whole = json.loads(path.read_text())
    for changed in (whole[:-1], [{**whole[0], "area": 1}, *whole[1:]]):
        path.write_text("[\n" + ",\n".join(map(json.dumps, changed)) + "\n]\n")
        assert label(checkpoint, tmp_path / "in", tmp_path / "out", "rle") == 0
        assert sorted(map(str, json.loads(path.read_text()))) == sorted(map(str, whole))


def test_a_copy_of_the_results_is_known(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in/0.png")
    assert label(checkpoint, tmp_path / "in", tmp_path / "out", "index", "rle") == 0
    shutil.copytree(tmp_path / "out", tmp_path / "copy", copy_function=shutil.copyfile)
    capsys.readouterr()
    assert label(checkpoint, tmp_path / "in", tmp_path / "copy", "index", "rle") == 0
    assert "1 were there already" in capsys.readouterr().out


def test_a_damaged_record_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    good = Result("index/a.png", "0" * 32, 4, 5, 6)
    lines = [
        b"\0" * 50,
        b"{",
        b"[" * 50_000,
        b'["index/b.png", 1, 2, 3, 4]',
        b"\xff",
        json.dumps(good).encode(),
        b'["in',
    ]
    (tmp_path / RECORD).write_bytes(b"\n".join(lines))
    assert list(read_record(tmp_path)) == [good]
    assert not Existing(tmp_path, {good.key}, ("index",)).has(good.key, good.made_of)  # there is no such file
    os.unlink(tmp_path / RECORD)
    os.mkfifo(tmp_path / RECORD)
    with pytest.raises(OSError, match="not a regular file"):
        list(read_record(tmp_path))


@pytest.mark.parametrize("entry", ["[" * 50_000, '{"image": 5}', '{"image": []}', '["image"]', "\0" * 100])
def test_an_odd_rle_is_refused(checkpoint: Path, tmp_path: Path, entry: str) -> None:
    write(tmp_path / "in/0.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/rle.json").write_text(f"[\n{entry}\n]\n")
    with pytest.raises(CommandError, match="not a list that `ssaseg predict` wrote"):
        label(checkpoint, tmp_path / "in", tmp_path / "out", "rle")
    assert files(tmp_path / "out") == ["rle.json"]


# ---- several commands --------------------------------------------------------------------------------------------
def test_two_commands_at_once(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(tmp_path / "in/mine.png")
    other = start_other(out)
    try:
        assert label(checkpoint, tmp_path / "in", out, "rle") == 0
        assert labelled_images(out / "rle.json") == {"mine.png"}  # the other one adds its own at its end
    finally:
        other.communicate()
    assert other.returncode == 0
    assert labelled_images(out / "rle.json") == {"mine.png", "other.png"}
    assert {result.key for result in read_record(out)} == {"rle.json/mine.png", "rle.json/other.png"}
    assert sorted(os.listdir(out)) == [RECORD, "classes.json", "manifest.jsonl", "rle.images.json", "rle.json"]


def test_a_killed_command_loses_nothing(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(tmp_path / "in/mine.png")
    other = start_other(out)
    left = out / "index/deep" / f".{'0' * 16}.partial"
    write(left.with_suffix(".png")).rename(left)
    os.kill(other.pid, signal.SIGKILL)
    other.communicate()
    (out / f".predict-{'0' * 16}.lock").touch()  # of one that was killed when it had deleted its journal
    assert label(checkpoint, tmp_path / "in", out, "index") == 0  # any later command
    assert labelled_images(out / "rle.json") == {"other.png"}
    assert label(checkpoint, tmp_path / "in", out, "rle") == 0
    entries = json.loads((out / "rle.json").read_text())
    assert [entry["category_id"] for entry in entries if entry["image"] == "other.png"] == [0, 3]
    assert sorted(os.listdir(out)) == [RECORD, "classes.json", "index", "manifest.jsonl", "rle.images.json", "rle.json"]
    assert not left.exists()


def test_temporary_files_of_a_running_command_stay(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(tmp_path / "in/mine.png")
    killed, running = start_other(out), start_other(out)
    killed.kill()
    killed.communicate()
    temporary = out / f".{'0' * 16}.partial"
    temporary.touch()
    try:
        assert label(checkpoint, tmp_path / "in", out, "rle") == 0
        assert temporary.exists()
    finally:
        running.communicate()


def test_a_lock_that_stays_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def held(*_: object) -> None:
        raise journal.FolderInUse("process 7 on \x1b[2J")

    monkeypatch.setattr(journal, "FolderLock", held)
    monkeypatch.setattr(journal.time, "sleep", lambda _: None)
    times = iter(range(0, 10_000, 100))
    monkeypatch.setattr(journal.time, "monotonic", lambda: next(times))
    with (
        pytest.raises(CommandError, match=r"still locked by another .*\(process 7 on \\x1b\[2J\)"),
        exclusive(tmp_path),
    ):
        pass
    assert capsys.readouterr().err.count("waiting for another") == 1


def test_a_file_system_without_locks(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    write(tmp_path / "in/0.png")
    killed = start_other(tmp_path / "out")
    killed.kill()
    killed.communicate()
    monkeypatch.setattr(writing.fcntl, "lockf", no_locks)
    assert label(checkpoint, tmp_path / "in", tmp_path / "out", "rle") == 0
    assert "no locks on this file system" in capsys.readouterr().err
    assert labelled_images(tmp_path / "out/rle.json") == {"0.png", "other.png"}


def test_a_folder_made_anew_is_left_alone(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in/0.png")
    out = tmp_path / "out"
    real = Journal.check

    def replace(given: Journal) -> None:
        if out.exists():
            out.rename(tmp_path / "moved")
            (out / "index").mkdir(parents=True)
        real(given)

    monkeypatch.setattr(Journal, "check", replace)
    with pytest.raises(OSError, match="deleted or replaced"):
        label(checkpoint, tmp_path / "in", out)
    assert files(out) == []


def test_results_stay_in_the_journal_if_they_cannot_be_added(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in/0.png")
    out = tmp_path / "out"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "rle.json")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "write_objects", full)
        with pytest.raises(OSError, match="No space left"):
            label(checkpoint, tmp_path / "in", out, "rle")
    assert not (out / "rle.json").exists()
    assert label(checkpoint, tmp_path / "in", out, "rle") == 0
    assert labelled_images(out / "rle.json") == {"0.png"}
