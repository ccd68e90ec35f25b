"""Shards that are killed again and again: in the end each image is there once, and no byte differs."""

import json
import os
from pathlib import Path

import pytest
from calling import call
from killing import SHARDS, images_of, kill_shards
from predicting import files, picture, save_checkpoint, write

from ssaseg.cli.results.manifest import MANIFEST

pytestmark = pytest.mark.usefixtures("one_thread", "tiny")


@pytest.mark.parametrize(
    ("kills", "images"), [pytest.param(6, 24, id="6"), pytest.param(100, 240, marks=pytest.mark.slow, id="100")]
)
def test_killed_shards_lose_nothing(kills: int, images: int, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "tiny.safetensors", network="seaformer_x")
    for number in range(images):
        write(tmp_path / f"in/{number % 5}/{number:03}.png", picture(32, 32 + number % 7, number))
    words = ["predict", str(checkpoint), str(tmp_path / "in"), "--device", "cpu", "--save", "index,rle,shares", "--out"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert call(*words, whole).exit_code == 0
    counts = kill_shards([*words, str(out)], kills, kills, tmp_path / "log")
    print(f"{kills} kills of {SHARDS} shards, {images} images: {dict(counts)}")
    found = sum((images_of(path) for path in (out / "manifest").glob("*.jsonl")), start=type(counts)())
    assert sorted(found) == sorted(json.loads(line)["file"] for line in (whole / MANIFEST).read_bytes().splitlines())
    assert set(found.values()) == {1}
    assert call("merge", out).exit_code == 0
    assert [name for name in files(out) if not name.startswith("manifest/")] == files(whole)
    for name in [*files(whole), "classes.json", "rle.images.json", "shares.csv"]:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    merged, expected = (
        [{**json.loads(line), "seconds": 0} for line in (folder / MANIFEST).read_bytes().splitlines()]
        for folder in (out, whole)
    )
    assert merged == expected
    assert len(merged) == images
    assert sorted(os.listdir(out / "manifest")) == [f"shard-{number}-of-{SHARDS}.jsonl" for number in range(SHARDS)]
