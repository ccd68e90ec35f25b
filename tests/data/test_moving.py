"""Recipes of `data init` where data or recipes are moved; merged classes, as docs/data.md shows them; exports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from calling import call, put
from places import PROJECT

from ssaseg.cli.data import reading
from ssaseg.datasets import build_dataset
from ssaseg.recipes import load_recipe
from ssaseg.recipes.resuming import FREE_KEYS, flat

LAYOUTS = {
    "names": [("images", "masks")],
    "pairs": [("a/images", "a/masks"), ("b/images", "b/masks")],
}


@pytest.fixture(autouse=True)
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "count_cores", lambda: 0)


def found(recipe: Path, *words: str) -> dict[str, list[str]]:
    """The images of both splits, read by a recipe."""
    data = load_recipe(str(recipe), words).data
    splits = {}
    for split in ("train", "val"):
        pairs = build_dataset(data.dataset, split, root=Path(data.root), options=data.model_dump())
        pairs.load(0)
        splits[split] = [pairs.name(index) for index in range(len(pairs))]
    return splits


def make(root: Path, kind: str) -> None:
    for images, masks in LAYOUTS[kind]:
        for number in range(3):
            put(root / images / f"{number} é.png")
            put(root / masks / f"{number} é.png", (0, 1))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_recipes_of_init_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    work = tmp_path / "the work"
    make(work / "photos", kind)
    monkeypatch.chdir(work)
    done = call("data", "init", "photos", "--out", "own.yaml", "--model", "seaformer_t")
    assert done.exit_code == 0, done.output
    before, old = found(Path("own.yaml")), flat(load_recipe("own.yaml").model_dump(mode="json"))
    assert all(before.values())
    text = Path("own.yaml").read_text()
    assert '"${recipe_dir}/photos"' in text
    assert '"${recipe_dir}/own.train.txt"' in text

    moved = tmp_path / "moved é"
    work.rename(moved)
    monkeypatch.chdir(tmp_path)
    assert found(moved / "own.yaml") == before, "both were moved"
    new = flat(load_recipe(str(moved / "own.yaml")).model_dump(mode="json"))
    assert {key for key in old if old[key] != new[key]} <= FREE_KEYS.keys(), "a run can be resumed"

    first_folder = LAYOUTS[kind][0][0]
    put(moved / "photos" / first_folder / "new.png")
    checked = call("data", "check", moved / "own.yaml").stdout
    assert f"1 image is in no list of a split, and not used: {moved}/photos/{first_folder}/new.png" in checked
    (moved / "photos").rename(tmp_path / "elsewhere")
    assert found(moved / "own.yaml", "data.root=elsewhere") == before, "the data were moved"
    (tmp_path / "child.yaml").write_text("extends: moved é/own.yaml\ndata: {root: elsewhere}\n")
    assert found(Path("child.yaml")) == before
    assert call("recipes", "copy", "moved é/own.yaml", "copy.yaml").exit_code == 0
    assert found(Path("copy.yaml"), "data.root=elsewhere") == before
    (tmp_path / "resolved.yaml").write_text(call("train", "copy.yaml", "--print-config").stdout)
    assert found(Path("resolved.yaml"), "data.root=elsewhere") == before


def test_data_that_are_not_below_the_recipe(tmp_path: Path) -> None:
    make(tmp_path / "data", "names")
    (tmp_path / "recipes").mkdir()
    recipe = tmp_path / "recipes/own.yaml"
    assert call("data", "init", tmp_path / "data", "--out", recipe, "--model", "seaformer_t").exit_code == 0
    before = found(recipe)
    (tmp_path / "recipes").rename(tmp_path / "moved")
    assert found(tmp_path / "moved/own.yaml") == before


def test_merged_classes_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands and the recipe of docs/data.md; the pixels of the scenes' classes are added up."""
    monkeypatch.chdir(tmp_path)
    page = (PROJECT / "docs/data.md").read_text(encoding="utf-8")
    section = page.partition("## Merging classes\n")[2].partition("\n## ")[0]
    exports, recipe, commands = re.findall(r"```\w*\n(.*?)```", section, flags=re.DOTALL)
    Path("merged.yaml").write_text(recipe)
    for line in exports.splitlines():
        assert call(*line.split()[1:], "--size", "64", "64").exit_code == 0, line
    assert commands.startswith("ssaseg data check merged.yaml ")
    result = call("data", "check", "merged.yaml", "--split", "val", "--json", "-")
    assert result.exit_code == 0, result.output
    (split,) = json.loads(result.stdout)["splits"]
    assert [row["name"] for row in split["classes"]] == ["sky", "land", "water", "object"]
    into = load_recipe("merged.yaml").data.raw_to_train
    raw = {row["id"]: row["pixels"] for row in split["raw_ids"]}
    for row in split["classes"]:
        assert row["pixels"] == sum(pixels for value, pixels in raw.items() if (into or {}).get(value) == row["id"]) > 0


def test_init_says_how_to_merge_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        put(tmp_path / f"d/images/{split}/0.png")
        put(tmp_path / f"d/masks/{split}/0.png", (0, 1, 2))
    assert call("data", "init", tmp_path / "d", "--out", tmp_path / "r.yaml", "--model", "seaformer_t").exit_code == 0
    text = (tmp_path / "r.yaml").read_text()
    assert "# To merge classes, write raw_to_train: {0: 0, 1: 1, 2: 2}, with one number for their ids" in text
    assert "list the new classes in that order (docs/data.md)" in " ".join(text.replace("#", "").split())


@pytest.mark.parametrize(
    ("layout", "recipe"),
    [("folder", None), ("coco", None), ("ade20k", "ade20k-seaformer_b-ssa"),
     ("pascal_context", "pascal_context_59-seaformer_b-ssa")],
)  # fmt: skip
def test_exports_pass_the_check(tmp_path: Path, layout: str, recipe: str | None) -> None:
    for split in ("train", "val"):
        words = ["--layout", layout, "--split", split, "--count", "4", "--size", "96", "96"]
        assert call("data", "export", tmp_path, *words).exit_code == 0
    result = call("data", "check", *([recipe, f"data.root={tmp_path}"] if recipe else [tmp_path]))
    assert result.exit_code == 0, result.output
    assert "no problems found" in result.stdout
    assert ("classes of built-in scenes (`ssaseg data export`)" in result.stdout) == (recipe is not None)
