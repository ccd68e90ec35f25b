"""The page of a recipe's keys: current, complete, and its defaults are those that a recipe gets."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from places import PROJECT

from ssaseg.cli.help_tables import help_tables
from ssaseg.cli.main import cli
from ssaseg.cli.recipe_keys import collect, read_schema
from ssaseg.cli.recipe_page import recipe_page
from ssaseg.recipes import load_recipe
from ssaseg.recipes.reading import Layer, apply_overrides

PAGE = PROJECT / "docs" / "recipe.md"
# A recipe that says no more than what is required.
LEAST = """
model: {name: seaformer_t}
data: {classes: [a, b], train: {images: t, masks: m}, val: {images: v, masks: w}}
augment: {scale: [64, 64], crop: [64, 64]}
optim: {lr: 0.1}
train: {steps: 1}
"""


def keys(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["recipes", "keys", *arguments])


def flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; what is empty stays."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, dict) and value else {above + key: value}
    return found


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == recipe_page(), "run `make docs`"
    assert keys().output == recipe_page()
    assert max(map(len, recipe_page().splitlines())) <= 120


def test_every_key_of_a_recipe_is_told_once() -> None:
    listed = re.findall(r"^- `([^`]+)`: ", recipe_page(), flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    for name in ("demo", "camvid-seaformer_b-ssa", "coco_stuff10k-cgrseg_b-linear"):
        held = {re.sub(r"^(optim\.rules)\.[^.]+", r"\1.NAME", key) for key in flat(load_recipe(name).model_dump())}
        held = {re.sub(r"^data\.val\.", "data.train.", key) for key in held}  # listed once for both
        assert held <= set(listed), name
    assert {"loss.ohem.threshold", "data.train.annotations", "optim.rules.NAME.decay", "data.synthetic"} <= set(listed)


def test_the_defaults_are_those_that_a_recipe_gets(tmp_path: Path) -> None:
    (tmp_path / "least.yaml").write_text(LEAST)
    got = flat(load_recipe(str(tmp_path / "least.yaml")).model_dump(mode="json"))
    given = ("data.train", "data.val", "data.classes")
    for key in [key for part in read_schema() for key in part.keys if not key.name.startswith(given)]:
        written = re.fullmatch(r"default `(.*)`", key.default)
        if written and key.name in got:  # read as a recipe's text is
            assert apply_overrides(Layer({}, {}), [f"value={written[1]}"]).values == {"value": got.pop(key.name)}, key
        elif key.default.startswith("**required**") and not key.section:
            assert got.pop(key.name, None) is not None or key.name.startswith("data.synthetic."), key
    assert {key for key in got if not key.startswith(given)} == {"name"}


@pytest.mark.parametrize(
    "line",
    [
        "- `name`: text; default: the file's stem.",
        "- `model.classifier`: one of cac, dnc, gmmseg, linear, protoseg, ssa; default `ssa`.",
        "- `model.drop_path`: 0 <= number < 1 or null; default `null`.",
        "- `data.val`: section or null; default `null`.",
        "- `augment.crop`: [32 <= integer <= 16384, 32 <= integer <= 16384]; **required**.",
        "- `augment.cat_max_ratio`: 0 < number <= 1; default `0.75`.",
        "- `test.ratios`: list of 0.01 <= number <= 100; default `[1.0]`.",
        "- `optim.lr`: number > 0; **required**.",
        "- `optim.freeze`: list of backbone, norm; default `[]`.",
        "- `train.micro_batch`: 1 <= integer <= 65536 or auto or null; default `null`.",
        "- `train.deterministic`: true or false; default `false`.",
        "- `distill`: section; default: the defaults of its keys.",
        "- `loss.class_weights`: mapping of NAME to number >= 0; default `{}`.",
        "  Exponent of the polynomial decay; 0: constant.",
        "  folder (image/mask pairs on disk), coco_json (COCO-format annotations), synthetic (scenes that ssaseg draws",
    ],
)
def test_lines_say_what_the_schema_says(line: str) -> None:
    assert line in recipe_page().splitlines()


def test_the_command_prints_a_section_or_a_key() -> None:
    section = keys("loss").output
    assert section.startswith("## loss\n")
    assert "- `loss.ohem.threshold`: 0 < number <= 1; default `0.7`." in section
    assert "`optim." not in section
    assert keys("data.val").output.startswith("## data.train, data.val\n")
    assert (
        keys("train.steps").output.splitlines()[0]
        == "- `train.steps`: 1 <= integer <= 100000000 or null; **required**, or train.epochs."
    )


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [
        ("flip", "did you mean augment.flip or test.flip?"),
        ("optm", "did you mean optim?"),
        ("train.stepps", "did you mean train.steps?"),
        ("zzz", "sections: model, data, "),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest(wanted: str, hint: str) -> None:
    result = keys(wanted)
    assert result.exit_code == 2
    assert f"error: {wanted}: no section or key" in result.stderr
    assert hint in result.stderr


def test_the_table_of_names_is_current() -> None:
    """Help pages and `recipes keys` read it, to be quick."""
    assert json.loads(json.dumps(collect())) == help_tables(), "run `make docs`"
