"""Shards of `ssaseg eval`: the merged scores are those of one command, and what is not merged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import call
from click.testing import Result

from ssaseg.cli.evaluation import report
from ssaseg.cli.evaluation.counts import read_counts
from ssaseg.cli.sharding import Shard
from ssaseg.datasets.synthetic import CLASSES
from ssaseg.models import build_model, save_model

pytestmark = pytest.mark.usefixtures("one_thread", "tiny")
IMAGES, SHARDS = 7, 3
EVERYTHING = ("--boundary", "--calibration")


def save(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    recipe = {
        "model": {"name": "seaformer_t"},
        "data": {"dataset": "synthetic", "synthetic": {"height": 64, "width": 64, "train": 1, "val": IMAGES}},
        "augment": {"scale": [64, 64], "crop": [64, 64]},
        "test": {"scale": None, "multiple": 32},
        "optim": {"lr": 0.001},
        "train": {"steps": 1},
    }
    header = {"classes": list(CLASSES), "protocol": recipe["test"], "recipe": recipe, "step": 7}
    model = build_model("seaformer_x", len(CLASSES))
    with torch.no_grad():  # otherwise all pixels are one class
        model.classifier.conv_seg.weight.normal_(std=3)
    save_model(path, model, header)
    return path


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "WORKERS", 0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("scores")
    return [save(folder / "a.safetensors", 0), save(folder / "b.safetensors", 1)]


def count(files: list[Path], out: Path, shard: str, *words: str) -> Result:
    return call("eval", *files, "--device", "cpu", "--shard", shard, "--out", out, *words)


def scores(*words: str | Path) -> tuple[dict[str, Any], str]:
    """The report of a command, and what it prints without `--json`; both without the speed."""
    made = call(*words, "--json", "-")
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    for each in found.get("models", [found]):
        assert each.pop("images_per_s") > 0
    told = call(*words)
    return found, "\n".join(line for line in told.stdout.splitlines() if "images/s" not in line)


@pytest.mark.parametrize(("networks", "words"), [(1, EVERYTHING), (2, ("--calibration",)), (1, ("--limit", "5"))])
def test_merged_scores_are_those_of_one_command(
    pair: list[Path], tmp_path: Path, networks: int, words: tuple[str, ...]
) -> None:
    files = pair[:networks]
    images = 0
    for number in range(SHARDS):
        result = count(files, tmp_path, f"{number}/{SHARDS}", *words)
        assert result.exit_code == 0, result.output
        assert "mIoU" not in result.stdout
        counts = read_counts(tmp_path / f"counts/shard-{number}-of-{SHARDS}.counts")
        assert all(Shard(number, SHARDS).has(name) for name in counts.names)
        assert len(counts.sums) == networks
        images += len(counts.names)
    assert images == (5 if "--limit" in words else IMAGES)
    expected = scores("eval", *files, "--device", "cpu", *words)
    merged = scores("merge", tmp_path)
    assert merged == expected  # to the bit: JSON has every digit
    assert "mIoU" in merged[1]
    assert scores("merge", tmp_path) == merged
    first = merged[0].get("models", [merged[0]])[0]
    assert 0 < first["mIoU"] < 100
    assert first["mIoU_interval"]["low"] < first["mIoU_interval"]["high"]
    if words == EVERYTHING:
        assert 0 < first["mBoundaryIoU"] < 100
        assert first["calibration"]["pixels"] > 0


def test_the_order_of_images_decides_the_interval(pair: list[Path], tmp_path: Path) -> None:
    """Rows are put back in their places: appended shard by shard, they would make another interval."""
    for number in range(SHARDS):
        assert count(pair[:1], tmp_path, f"{number}/{SHARDS}").exit_code == 0
    every = [read_counts(tmp_path / f"counts/shard-{number}-of-{SHARDS}.counts") for number in range(SHARDS)]
    numbers = [number for each in every for number in each.numbers]
    assert numbers != sorted(numbers)
    assert sorted(numbers) == list(range(IMAGES))


def test_what_is_not_merged(pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = (out / f"counts/shard-{number}-of-2.counts" for number in (0, 1))
    assert count(pair[:1], out, "0/2").exit_code == 0
    result = call("merge", out)
    assert result.exit_code == 1
    assert "shard 1/2: missing: no counts/shard-1-of-2.counts" in result.stderr
    assert result.stdout == ""
    for files, words, said in (
        (pair[:1], ("1/3",), "a shard of 2, but shard 1/3 is of 3"),
        (pair[1:], ("1/2",), "a shard of another run: other FILEs"),
        (pair[:1], ("1/2", "--limit", "3"), "a shard of another run: --limit"),
        (pair[:1], ("1/2", "--flip"), "another protocol or engine"),
        (pair[:1], ("1/2", "--boundary"), "another protocol or engine"),
    ):
        result = count(files, out, *words)
        assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
        assert [*(out / "counts").iterdir()] == [first]
    shutil.copy(first, second)
    result = call("merge", out)
    assert (result.exit_code, "two shards with the same number" in result.stderr) == (2, True)
    whole = first.read_bytes()
    for content in (whole[:-9], b"", b"\0" * 99, whole[:500] + b"?" + whole[501:]):
        second.write_bytes(content)
        result = call("merge", out)
        assert (result.exit_code, "not the counts of a shard, or damaged" in result.stderr) == (2, True)
        assert str(second) in result.stderr
    assert count(pair[:1], out, "1/2").exit_code == 0  # made again
    assert call("merge", out).exit_code == 0
    other = tmp_path / "other"
    assert count(pair[1:], other, "1/2").exit_code == 0
    shutil.copy(other / "counts" / second.name, second)
    result = call("merge", out)
    assert (result.exit_code, "a shard of another run: other FILEs" in result.stderr) == (2, True)


def test_options_that_do_not_go_together(pair: list[Path], tmp_path: Path) -> None:
    for words, said in (
        (("--shard", "0/2"), "give --out DIR too"),
        (("--shard", "2/2", "--out", tmp_path), "start at 0"),
        (("--out", tmp_path, "--json", "-"), "--json: not with --out"),
        (("--out", tmp_path, "--report", tmp_path / "page"), "--report: not with --out"),
    ):
        result = call("eval", pair[0], "--device", "cpu", *words)
        assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    (tmp_path / "manifest").mkdir()
    result = call("merge", tmp_path, "--json", "-")
    assert (result.exit_code, "there are no scores here" in result.stderr) == (2, True)


def test_an_array_is_not_a_shard_without_out(pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of an array may each score a file of their own."""
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    result = call("eval", pair[0], "--device", "cpu", "--limit", "2", "--json", "-")
    assert json.loads(result.stdout)["images"] == 2
    result = call("eval", pair[0], "--device", "cpu", "--limit", "2", "--out", tmp_path)
    assert (result.exit_code, "shard 1/2, by SLURM_ARRAY_TASK_ID=1" in result.stderr) == (0, True)
    assert [path.name for path in (tmp_path / "counts").iterdir()] == ["shard-1-of-2.counts"]
