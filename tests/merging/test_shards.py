"""Shards of `ssaseg predict`: which image belongs to which, what `ssaseg merge` makes of them, and what is refused."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from calling import call
from click.testing import Result
from predicting import files, picture, save_checkpoint, write

from ssaseg.cli import sharding
from ssaseg.cli.errors import CommandError
from ssaseg.cli.merging.rest import command_for
from ssaseg.cli.prediction.journal import RECORD
from ssaseg.cli.prediction.shards import ShardJournal, run_of, shard_file
from ssaseg.cli.prediction.sources import Source
from ssaseg.cli.results.manifest import MANIFEST, Entry, read_manifest
from ssaseg.cli.sharding import WHOLE, Shard, chosen_shard, parse_shard, shard_of
from ssaseg.files import writing

pytestmark = pytest.mark.usefixtures("one_thread", "tiny")
NAMES = ["0.png", "b.jpg", "c.png", "deep/a.png", "deep/er/z.png", "e.png", "f.png", "é.png"]
SHARDS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors", network="seaformer_x")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed, name in enumerate(NAMES):
        write(folder / name, picture(33 + seed, 40, seed))
    return folder


def label(checkpoint: Path, photos: Path, out: Path, *words: str, save: str = "index,rle,shares") -> Result:
    return call("predict", checkpoint, photos, "--out", out, "--save", save, "--device", "cpu", *words)


def label_shards(checkpoint: Path, photos: Path, out: Path, *words: str, save: str = "index,rle,shares") -> None:
    for number in range(SHARDS):
        result = label(checkpoint, photos, out, "--shard", f"{number}/{SHARDS}", *words, save=save)
        assert result.exit_code == 0, result.output


def contents(out: Path) -> dict[str, bytes]:
    """All results and files of all images; of the manifest what does not depend on the clock."""
    found = {name: (out / name).read_bytes() for name in files(out) if not name.startswith("manifest/")}
    found |= {name: (out / name).read_bytes() for name in ("classes.json", "rle.images.json", "shares.csv")}
    lines = [json.loads(line) for line in (out / MANIFEST).read_text().splitlines()]
    return {**found, MANIFEST: json.dumps([{**line, "seconds": 0} for line in lines]).encode()}


# ---- which image belongs to which shard --------------------------------------------------------------------------
def test_the_hash_never_changes() -> None:
    """Shards of different versions of this program must agree, and no file that is added may move another one."""
    assert [shard_of(name, 4) for name in ("a.jpg", "deep/a.png", "é.png", "\udcff.png")] == [1, 0, 2, 0]
    counts = Counter(shard_of(f"images/{number:05}.jpg", 4) for number in range(10_000))
    assert all(2300 < counts[number] < 2700 for number in range(4))
    name = "a.jpg"
    assert [Shard(number, 5).has(name) for number in range(5)].count(True) == 1
    assert WHOLE.has(name)


def test_numbers_of_shards() -> None:
    assert parse_shard("0/4") == Shard(0, 4)
    assert parse_shard("3/4") == Shard(3, 4)
    assert parse_shard("none") == WHOLE
    for text, said in {
        "4/4": "start at 0: 0/4 to 3/4",
        "0/0": "expected 1 to 100000",
        "0/200000": "expected 1 to 100000",
        "1": "is not i/n",
        "-1/4": "is not i/n",
        "1/4/2": "is not i/n",
        "²/4": "is not i/n",
        "": "is not i/n",
    }.items():
        with pytest.raises(ValueError, match=said):
            parse_shard(text)


def array(number: int, count: int, low: int, high: int) -> dict[str, str]:
    words = {"ID": number, "COUNT": count, "MIN": low, "MAX": high}
    return {f"SLURM_ARRAY_TASK_{word}": str(value) for word, value in words.items()}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (array(2, 4, 0, 3), "2/4"),
        (array(1, 4, 1, 4), "0/4"),  # arrays may start at 1
        (array(7, 4, 1, 7), "3/4"),  # and have steps
        (array(5, 1, 5, 5), "0/1"),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, "3/4"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "1/2"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "0/1"),
        ({}, "0/1"),
        (array(3, 3, 1, 7), "SLURM_ARRAY_TASK_ID=3 of 3 tasks from 1 to 7\nexpected numbers with one step"),
        (array(9, 4, 0, 3), "SLURM_ARRAY_TASK_ID=9 of 4 tasks"),
        (array(2, 0, 0, 3), "expected numbers with one step"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, WORLD_SIZE=2"),
        ({"RANK": "two", "WORLD_SIZE": "2"}, "RANK=two"),
        (array(2, 4, 0, 3) | {"RANK": "0", "WORLD_SIZE": "2"}, "not both"),
    ],
)
def test_the_environment_says_which_shard(
    environment: dict[str, str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sharding.os, "environ", environment)
    monkeypatch.setattr("ssaseg.cli.errors.own_errors", False)
    if "/" not in expected:
        with pytest.raises(CommandError, match=expected):
            chosen_shard(None)
        return
    shard = chosen_shard(None)
    assert str(shard) == expected
    told = capsys.readouterr().err
    assert told.count("\n") == (shard.total > 1), "a default that changes what is done is said in one line"
    assert (f"shard {expected}" in told) == (shard.total > 1)
    assert chosen_shard(parse_shard("none")) == WHOLE


def test_the_option(checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = label(checkpoint, photos, tmp_path, "--shard", "4/4")
    assert (result.exit_code, os.listdir(tmp_path)) == (2, [])
    assert "start at 0" in result.stderr
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    assert "shard 1/3, by SLURM_ARRAY_TASK_ID=1" in label(checkpoint, photos, tmp_path / "a").stderr
    assert [*(tmp_path / "a/manifest").iterdir()] == [shard_file(tmp_path / "a", Shard(1, 3))]


# ---- merging -----------------------------------------------------------------------------------------------------
def test_merged_is_what_one_command_writes(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    save = "index,color,rle,shares"
    assert label(checkpoint, photos, tmp_path / "one", save=save).exit_code == 0
    label_shards(checkpoint, photos, tmp_path / "out", save=save)
    first = call("merge", tmp_path / "out")
    assert (first.exit_code, first.stderr) == (0, "")
    assert f"merged 3 shards: {len(NAMES)} images" in first.stdout
    merged = contents(tmp_path / "out")
    assert merged == contents(tmp_path / "one")
    record = (tmp_path / "out" / RECORD).read_bytes()
    assert call("merge", tmp_path / "out").stdout == first.stdout
    assert contents(tmp_path / "out") == merged
    assert (tmp_path / "out" / RECORD).read_bytes() == record
    entries = [*read_manifest(tmp_path / "out")]
    assert [entry.file for entry in entries] == sorted(NAMES)
    assert entries[0].outputs == ["index/0.png", "color/0.png", "rle.json", "shares.json"]
    assert (entries[0].size, entries[0].error) == ((40, 33), None)
    assert 0 < entries[0].seconds < 100


def test_one_command_after_another_writes_the_same_files(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    """Files of all images depend neither on the order of commands nor on that of INPUTs."""
    whole = label(checkpoint, photos, tmp_path / "one")
    assert whole.exit_code == 0, whole.output
    for name in ("f.png", "0.png", "b.jpg"):
        assert label(checkpoint, photos / name, tmp_path / "out").exit_code == 0
    assert label(checkpoint, photos, tmp_path / "out", "--resume").exit_code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    result = call("merge", tmp_path / "out")
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, f"no shards to merge: {len(NAMES)} images")


def test_a_failed_image_is_reported_and_tried_again(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        write(tmp_path / "in" / name)
    (tmp_path / "in/b.png").write_bytes(b"no image")
    mine = str(Shard(shard_of("b.png", 2), 2))
    codes = {
        shard: label(checkpoint, tmp_path / "in", tmp_path / "out", "--shard", shard).exit_code
        for shard in ("0/2", "1/2")
    }
    assert codes == {shard: int(shard == mine) for shard in ("0/2", "1/2")}
    merged = call("merge", tmp_path / "out")
    assert merged.exit_code == 1
    assert "failed: b.png: " in merged.stderr
    assert "3 images, 1 of them failed" in merged.stdout
    entries = {entry.file: entry for entry in read_manifest(tmp_path / "out")}
    assert (entries["b.png"].outputs, entries["b.png"].size) == ([], None)
    assert entries["b.png"].error
    assert entries["a.png"].error is None
    write(tmp_path / "in/b.png")
    assert label(checkpoint, tmp_path / "in", tmp_path / "out", "--shard", mine, "--resume").exit_code == 0
    assert call("merge", tmp_path / "out").exit_code == 0
    assert [entry.error for entry in read_manifest(tmp_path / "out")] == [None] * 3


def test_what_is_missing_is_named_and_nothing_is_merged(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for shard in ("0/3", "1/3"):
        assert label(checkpoint, photos, out, "--shard", shard).exit_code == 0
    path = shard_file(out, Shard(0, 3))
    lines = path.read_bytes().splitlines(keepends=True)
    cut = json.loads(lines[-1])["file"]
    path.write_bytes(b"".join(lines)[:-20])  # as a kill or a full disk leaves it
    result = call("merge", out)
    assert result.exit_code == 1
    assert "not complete, so nothing was merged" in result.stderr
    assert f"shard 0/3: 1 of {len(lines) - 1} images are missing: {cut}" in result.stderr
    assert "shard 2/3: not begun" in result.stderr
    assert "--shard 0/3" in result.stderr
    assert not (out / MANIFEST).exists()
    again = label(checkpoint, photos, out, "--shard", "0/3", "--resume")
    assert (again.exit_code, "labelled 1 of" in again.stdout) == (0, True)
    kept = [json.loads(line)["file"] for line in path.read_bytes().splitlines()[1:]]
    assert sorted(kept) == sorted(json.loads(line)["file"] for line in lines[1:])
    assert label(checkpoint, photos, out, "--shard", "2/3").exit_code == 0
    assert call("merge", out).exit_code == 0
    (out / "index/c.png").write_bytes(b"")
    result = call("merge", out)
    assert (result.exit_code, "results of 1 images were changed or deleted: c.png" in result.stderr) == (1, True)


def test_the_command_for_the_rest() -> None:
    words = ["ssaseg", "predict", "m.pth", "my photos", "--shard", "0/4", "--out", "o", "--skip-existing"]
    assert command_for(words, Shard(2, 4)) == "ssaseg predict m.pth 'my photos' --out o --shard 2/4 --resume"
    words = ["ssaseg", "eval", "m.pth", "--shard=0/4", "--out", "o"]
    assert command_for(words, Shard(1, 4)) == "ssaseg eval m.pth --out o --shard 1/4"


def test_images_that_were_added_later(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write(tmp_path / "in" / name)
    label_shards(checkpoint, tmp_path / "in", tmp_path / "out")
    write(tmp_path / "in/new.png")
    result = call("merge", tmp_path / "out")
    assert result.exit_code == 0
    assert "1 images were not there when the shards began: new.png" in result.stderr
    shard = str(Shard(shard_of("new.png", SHARDS), SHARDS))
    again = label(checkpoint, tmp_path / "in", tmp_path / "out", "--shard", shard, "--resume")
    assert "labelled 1 of" in again.stdout
    result = call("merge", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (0, "")
    assert [entry.file for entry in read_manifest(tmp_path / "out")] == ["a.png", "b.png", "new.png"]


def test_a_shard_without_images(checkpoint: Path, tmp_path: Path) -> None:
    write(tmp_path / "in/a.png")
    for number in range(SHARDS):
        result = label(checkpoint, tmp_path / "in", tmp_path / "out", "--shard", f"{number}/{SHARDS}")
        mine = number == shard_of("a.png", SHARDS)
        assert (result.exit_code, f"labelled {int(mine)} of {int(mine)} images" in result.stdout) == (0, True)
    assert call("merge", tmp_path / "out").exit_code == 0


def test_a_folder_without_shards(tmp_path: Path) -> None:
    result = call("merge", tmp_path)
    assert (result.exit_code, "no results of shards in this folder" in result.stderr) == (2, True)
    assert call("merge", tmp_path / "nowhere").exit_code == 2


# ---- what is refused ---------------------------------------------------------------------------------------------
def state(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_runs_and_another_number_are_refused(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert label(checkpoint, photos, out, "--shard", "0/3").exit_code == 0
    other = save_checkpoint(tmp_path / "other.safetensors", "linear", network="seaformer_x")
    before = state(out)
    for model, words, said in (
        (checkpoint, ("--shard", "1/4"), "a shard of 3, but this command has shard 1/4"),
        (checkpoint, (), "a shard of 3, but this command has no --shard"),
        (checkpoint, ("--shard", "0/4", "--resume"), "expected one number of shards in one --out: --shard i/3"),
        (other, ("--shard", "1/3"), "a shard of another run: another CHECKPOINT"),
        (other, ("--shard", "0/3", "--resume"), "a shard of another run: another CHECKPOINT"),
        (checkpoint, ("--shard", "1/3", "--save", "color"), "--save index rle shares there, color here"),
        (checkpoint, ("--shard", "1/3", str(photos / "0.png")), "INPUT"),
        (checkpoint, ("--shard", "1/3", "--size", "32"), "other options"),
        (checkpoint, ("--shard", "1/3", "--exact"), "other options"),
    ):
        result = label(model, photos, out, *words)
        assert result.exit_code == 2, words
        assert said in result.stderr
        assert len(result.stderr.splitlines()) == 3
        assert state(out) == before, words


def test_shards_of_two_runs_are_not_merged(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    for out, save, shards in (("a", "index", 2), ("b", "color", 2), ("c", "index", 3)):
        for number in range(2):
            words = ("--shard", f"{number}/{shards}")
            assert label(checkpoint, photos, tmp_path / out, *words, save=save).exit_code == 0
    folders = [tmp_path / name / "manifest" for name in "abc"]
    shutil.copy(folders[1] / "shard-1-of-2.jsonl", folders[0])
    result = call("merge", tmp_path / "a")
    assert (result.exit_code, "a shard of another run: --save" in result.stderr) == (2, True)
    shutil.copy(folders[0] / "shard-0-of-2.jsonl", folders[0] / "shard-1-of-2.jsonl")
    result = call("merge", tmp_path / "a")
    assert (result.exit_code, "two shards with the same number" in result.stderr) == (2, True)
    os.unlink(folders[0] / "shard-1-of-2.jsonl")
    shutil.copy(folders[2] / "shard-1-of-3.jsonl", folders[0])
    result = call("merge", tmp_path / "a")
    assert (result.exit_code, "a shard of 3, but" in result.stderr) == (2, True)
    assert not (tmp_path / "a" / MANIFEST).exists()


@pytest.mark.parametrize("first", [b"", b"{", b"\0" * 30, b'{"shard": [0, 2]}\n', b"[" * 50_000])
def test_a_damaged_first_line(checkpoint: Path, photos: Path, tmp_path: Path, first: bytes) -> None:
    (tmp_path / "manifest").mkdir()
    shard_file(tmp_path, Shard(0, 2)).write_bytes(first)
    for result in (call("merge", tmp_path), label(checkpoint, photos, tmp_path, "--shard", "0/2", "--resume")):
        assert (result.exit_code, "its first line is damaged" in result.stderr) == (2, True)


def test_an_image_of_another_shard(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    for shard in ("0/2", "1/2"):
        assert label(checkpoint, photos, tmp_path, "--shard", shard).exit_code == 0
    first, second = (shard_file(tmp_path, Shard(number, 2)) for number in (0, 1))
    with first.open("ab") as file:
        file.write(second.read_bytes().splitlines(keepends=True)[1])
    result = call("merge", tmp_path)
    assert (result.exit_code, "is not an image of shard 0/2" in result.stderr) == (2, True)


def test_two_commands_with_one_number(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest").mkdir()
    code = (
        "import sys; from pathlib import Path; from ssaseg.files.writing import FolderLock; "
        "lock = FolderLock(Path(sys.argv[1]), sys.argv[2]); print('ready', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "manifest"), "shard-1-of-2.lock"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        result = label(checkpoint, photos, tmp_path, "--shard", "1/2")
        assert result.exit_code == 2
        assert f"another command works on shard 1/2 (process {other.pid} on" in result.stderr
        assert label(checkpoint, photos, tmp_path, "--shard", "0/2").exit_code == 0
        other.communicate()
    assert label(checkpoint, photos, tmp_path, "--shard", "1/2").exit_code == 0


def test_two_commands_with_one_number_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(writing.fcntl, "lockf", no_locks)
    given = (tmp_path, Shard(0, 2), run_of("0", "", ["index"], ["photos"]), True)
    image = Source("photos/a.png", "a.png", "a")
    entry = Entry("a.png", [], (1, 1), 0.0, None)
    with suppress(RuntimeError), ShardJournal(*given) as first, ShardJournal(*given) as second:
        first.begin([image], [image])
        second.begin([image], [image])
        second.add(entry)
        with pytest.raises(CommandError, match="another command has begun shard 0/2 anew"):
            first.add(entry)
        raise RuntimeError  # as the error would have ended it
    lines = shard_file(tmp_path, Shard(0, 2)).read_text().splitlines()
    assert [json.loads(line).get("file") for line in lines] == [None, "a.png"]
    assert "start each shard once" in capsys.readouterr().err


def test_a_full_disk_in_one_shard(
    checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    whole = label(checkpoint, photos, tmp_path / "one")
    assert whole.exit_code == 0, whole.output
    label_shards(checkpoint, photos, out)
    shutil.rmtree(out / "index")
    number = shard_of("deep/a.png", SHARDS)
    real = os.replace

    def full(temporary: Path, path: Path) -> None:
        if Path(path).name == "a.png":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(temporary, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        codes = {
            each: label(checkpoint, photos, out, "--shard", f"{each}/{SHARDS}", "--resume") for each in range(SHARDS)
        }
    assert {each: result.exit_code for each, result in codes.items()} == {
        each: 2 if each == number else 0 for each in range(SHARDS)
    }
    assert "No space left on device" in codes[number].stderr
    assert call("merge", out).exit_code == 1
    assert label(checkpoint, photos, out, "--shard", f"{number}/{SHARDS}", "--resume").exit_code == 0
    assert call("merge", out).exit_code == 0
    assert contents(out) == contents(tmp_path / "one")


def test_a_manifest_of_somebody_else_stays(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("mine\n")
    result = label(checkpoint, photos, tmp_path)
    assert (result.exit_code, "not a manifest that `ssaseg predict` wrote" in result.stderr) == (2, True)
    assert (tmp_path / MANIFEST).read_text() == "mine\n"
