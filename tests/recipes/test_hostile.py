"""Recipes that come from somewhere else end in a message: not in all memory, all time, or a traceback."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ssaseg.cli.data.check import open_target
from ssaseg.cli.errors import CommandError
from ssaseg.recipes import Recipe, RecipeError, dump_recipe, load_recipe, parse_recipe, recipe_file, recipe_text

DEMO = recipe_file("demo").read_text(encoding="utf-8")


def refusal(path: Path | str, *overrides: str) -> str:
    started = time.process_time()
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path), overrides)
    assert time.process_time() - started < 20
    return checked(str(caught.value))


def checked(message: str) -> str:
    assert 1 <= len(message.splitlines()) <= 3, message
    assert len(message) < 1500, message
    assert all(line.isprintable() for line in message.splitlines()), message
    return message


def write(folder: Path, text: str, name: str = "x.yaml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


# ---- the text ------------------------------------------------------------------------------------------------------
def bomb(levels: int, width: int) -> str:
    """width^levels values in a few lines."""
    first = f"a0: &a0 [{','.join(['x'] * width)}]\n"
    return first + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * width)}]\n" for i in range(1, levels))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (bomb(9, 9), "20000 values"),
        (bomb(3, 30), "20000 values"),
        ("a: &a {x: 1}\nb: {" + ", ".join(f"k{i}: *a" for i in range(15_000)) + "}\n", "20000 values"),
        ("x: [" + "1," * 25_000 + "]\n", "20000 values"),
        ("x: " + "[" * 30 + "]" * 30 + "\n", "nested too deeply"),
        ("x: " + "[" * 5000 + "]" * 5000 + "\n", "nested too deeply"),
        ("a: &a\n  b: *a\n", "contains itself"),
        ("x: " + "9" * 5000 + "\n", "cannot be read as a number"),
        ("x: " + "9" * 200 + "\n", "cannot be read as a number"),
        ("x: !!int five\n", "cannot be read"),
        ("x: !!bool five\n", "cannot be read"),
        ("x: !!timestamp five\n", "cannot be read"),
        ("x: !!timestamp 2001-01-01\n", "cannot be read"),
        ("x: !!binary aGFsbG8=\n", "cannot be read"),
        ("!!binary aGFsbG8=: 1\n", "cannot be read"),
        ("x: !!python/object/apply:os.getcwd []\n", "unknown key"),
        ('"a\\nb\\e[2J": 1\n', "unknown key a"),
        ("k" * 900 + ": 1\n", "unknown key kkk"),
        ("name: \"a\\0b\"\n", "without control characters"),
        ("#" * 300_000 + "\n", "larger than"),
    ],
)  # fmt: skip
def test_texts_that_are_no_recipe(tmp_path: Path, text: str, part: str) -> None:
    path = write(tmp_path, text if "name" in text else text + DEMO)
    assert part in refusal(path)
    if "name" not in text:
        with pytest.raises(RecipeError):
            load_recipe("camvid-seaformer_b-ssa", [f"data.root={text}"])


def test_what_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "folder.yaml").mkdir()
    assert "not a regular file" in refusal(tmp_path / "pipe.yaml")
    assert "not a regular file" in refusal(tmp_path / "zero.yaml")
    assert "a folder, expected a recipe's name or file" in refusal(tmp_path / "folder.yaml")
    for name in ("a\0b.yaml", "~nobody-has-this-name/x.yaml", "x" * 5000 + ".yaml", "x" * 5000, "\x1b[2J.yaml"):
        assert "no such file" in refusal(name) or "no shipped recipe" in refusal(name)
    with pytest.raises(RecipeError, match="not a regular file"):
        recipe_text(tmp_path / "pipe.yaml")
    for argument in ("a." * 3000 + "b=1", "x" * 5000, "x=" + "[" * 3000):
        refusal("demo", argument)


def test_bases_that_never_end(tmp_path: Path) -> None:
    for number in range(60):
        write(tmp_path, f"extends: n{number + 1}.yaml\n", f"n{number}.yaml")
    assert "more than 50 recipes" in refusal(tmp_path / "n0.yaml")
    # Nine of nine of nine …: each file names the next one nine times.
    for number in range(9):
        write(tmp_path, f"extends: [{', '.join([f'w{number + 1}.yaml'] * 9)}]\n", f"w{number}.yaml")
    write(tmp_path, DEMO, "w9.yaml")
    assert "more than 50 recipes" in refusal(tmp_path / "w0.yaml")
    assert "expected a recipe's name" in refusal(write(tmp_path, f"extends: [[{'1,' * 5000}]]\n"))
    write(tmp_path, "extends: ../" + tmp_path.name + "/x.yaml\n")
    assert "extends itself" in refusal(tmp_path / "x.yaml")


def test_a_folder_of_data_with_hostile_recipes(tmp_path: Path) -> None:
    write(tmp_path, bomb(9, 9) + DEMO, "a.yaml")
    os.mkfifo(tmp_path / "b.yaml")
    write(tmp_path, DEMO, "good.yaml")
    assert "good.yaml" in open_target(str(tmp_path), []).title
    for number in range(40):
        write(tmp_path, "a: 1", f"{number}.yaml")
    with pytest.raises(CommandError, match="43 YAML files"):
        open_target(str(tmp_path), [])


# ---- the values ----------------------------------------------------------------------------------------------------
def leaves(tree: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from leaves(value, (*above, key))


def integers(schema: Any) -> Iterator[Any]:
    """Every schema of a whole number in a JSON schema."""
    if isinstance(schema, dict):
        if schema.get("type") == "integer":
            yield schema
        for inner in schema.values():
            yield from integers(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from integers(inner)


def test_every_whole_number_has_a_limit() -> None:
    found = list(integers(Recipe.model_json_schema()))
    assert len(found) > 30
    for each in found:
        assert {"maximum", "exclusiveMaximum"} & each.keys(), each
        assert {"minimum", "exclusiveMinimum"} & each.keys(), each
        assert each.get("maximum", each.get("exclusiveMaximum")) <= 2**32, each


VALUES = [
    10**12, 10**25, 10**99, 0, -1, float("nan"), float("inf"), 1e308, 1e-320, -1e-320, "x" * 5000, "a\0b", "\ud800",
    "a\nb", "\x1b[2J", "", [], {}, None, True, [10**12] * 2, [[[[1]]]], {"a": 10**12}, {"a\nb": 1},
    {"\x1b[1m": {"lr": -1}}, ["x"] * 500, {str(number): 1 for number in range(500)},
]  # fmt: skip


@pytest.mark.parametrize("name", ["demo", "camvid-seaformer_b-ssa"])
def test_any_value_of_any_key_ends_in_a_recipe_or_a_message(name: str) -> None:
    recipe = load_recipe(name).model_dump(mode="json")
    for number, at in enumerate(leaves(recipe)):
        for value in VALUES[number % 3 :: 3]:  # the fuzzer tries the others
            changed = json.loads(json.dumps(recipe))
            section = changed
            for key in at[:-1]:
                section = section[key]
            section[at[-1]] = value
            try:
                dump_recipe(parse_recipe(changed, "x")).encode()
            except RecipeError as error:
                checked(str(error))


@pytest.mark.parametrize(
    "override",
    ["train.batch=1000000000000", "train.workers=100000", "train.keep=1000000000000", "train.log_every=10000000000",
     "data.synthetic.train=1000000000000", "data.synthetic.height=1000000", "data.synthetic.seed=4294967296",
     "augment.crop=[32,1000000]", "augment.scale=[1000000,1000000]", "augment.scale=[16384,16384]",
     "augment.ratio=[0.5,1e9]", "augment.ratio=[1e-300,1]", "test.scale=[16384,16385]", "test.multiple=1000000",
     "test.ratios=[1e9]", "distill.group=1000000000000", "optim.warmup=1000000000000"],
)  # fmt: skip
def test_what_no_machine_can_do(override: str) -> None:
    assert override.partition("=")[0] in refusal("demo", override)


def test_limits_that_depend_on_two_keys() -> None:
    assert "at most 128 with crops of 1024x1024" in refusal("demo", "train.batch=129", "augment.crop=[1024,1024]")
    assert load_recipe("demo", ["train.batch=128", "augment.crop=[1024,1024]"]).train.batch == 128
    slide = ["test.mode=slide", "test.crop=[512,512]"]
    assert "at least 1/64 of test.crop" in refusal("demo", *slide, "test.stride=[1,512]")
    assert "at most 268,435,456 pixels" in refusal("demo", "test.scale=[16384,16384]", "test.ratios=[1.5]")
    started = time.process_time()
    assert "a divisor of train.batch" in refusal(
        "demo", "train.batch=65536", "train.micro_batch=3", "augment.crop=[32,32]"
    )
    assert time.process_time() - started < 5


def test_an_old_recipe_in_a_checkpoint_with_other_types() -> None:
    stored = load_recipe("demo").model_dump(mode="json")
    for loss in (5, [], "x", None):
        with pytest.raises(RecipeError):
            parse_recipe({**stored, "distill": {"weights": {}}, "loss": loss}, "x.safetensors")
