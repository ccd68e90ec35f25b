"""Recipes: what loads, what every mistake is answered with."""

import json
from pathlib import Path

import pytest
from pydantic import BaseModel

from ssaseg.models import facts
from ssaseg.recipes import (
    Recipe,
    RecipeError,
    dump_recipe,
    list_recipes,
    load_recipe,
    parse_recipe,
    recipe_file,
    standalone_text,
)
from ssaseg.recipes.data import Folders, Synthetic
from ssaseg.recipes.schema import Rule

OWN = """\
model: {name: seaformer_t}
data:
  root: pictures
  train: {images: i/train, masks: m/train}
  val: {images: i/val, masks: m/val}
  classes: [cat, dog, "1e3"]
  raw_to_train: {7: 0, 8: 1, 9: 2, 0: 255}
augment: {scale: [64, 48], crop: [48, 64]}
optim: {lr: 1e-3, rules: {head: {lr: 10}}}
train: {steps: 10}
"""


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def refusal(name_or_path: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name_or_path, overrides, facts)
    message = str(caught.value)
    assert 1 <= len(message.splitlines()) <= 3, message
    return message


def test_every_shipped_recipe_loads_dumps_back_equal_and_states_its_claim(tmp_path: Path) -> None:
    assert {"demo", "camvid-seaformer_b-linear", "camvid-seaformer_b-ssa"} <= set(list_recipes())
    for name in list_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert load_recipe(write(tmp_path, "resolved.yaml", dump_recipe(recipe))) == recipe
        header = recipe_file(name).read_text(encoding="utf-8").split("\n\n")[0]
        assert header.startswith("# ")
        assert f"ssaseg train {name}" in header
        assert all(word in header for word in ("# Command:", "# Cost:", "# Score:", "# Source:"))


def test_the_two_camvid_recipes_differ_in_the_classifier_alone() -> None:
    linear, ssa = load_recipe("camvid-seaformer_b-linear"), load_recipe("camvid-seaformer_b-ssa")
    swapped = linear.model_copy(
        update={"name": ssa.name, "model": linear.model.model_copy(update={"classifier": "ssa"})}
    )
    assert linear != ssa
    assert swapped == ssa
    assert (ssa.augment.crop, ssa.augment.scale, ssa.test.scale) == ((360, 480), (480, 360), None)
    assert (ssa.optim.lr, ssa.train.batch, ssa.train.amp, len(ssa.data.classes)) == (2.5e-4, 16, "bf16", 11)
    assert (ssa.optim.rules["head"].lr, ssa.optim.rules["norm"].decay) == (10, 0)


def test_own_file_takes_its_stem_as_name_and_survives_yaml_and_json(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "mine.yaml", OWN))
    assert (recipe.name, recipe.optim.lr) == ("mine", 1e-3)
    assert recipe.data.raw_to_train == {7: 0, 8: 1, 9: 2, 0: 255}
    assert load_recipe(write(tmp_path, "other.yaml", dump_recipe(recipe))) == recipe
    as_json = json.loads(json.dumps(recipe.model_dump(mode="json")))  # what a checkpoint holds
    assert parse_recipe(as_json, "best.safetensors") == recipe


def test_recipes_do_not_change_after_loading() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("demo").train.steps = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("optim.lr=1e-3", 1e-3),
        ("optim.lr=2", 2.0),
        ("train.steps=160_000", 160_000),
        ("train.amp=off", "off"),
        ("augment.distortion=off", False),
        ("augment.crop=[360,480]", (360, 480)),
        ("test.scale=null", None),
        ("test.scale=", None),
        ("data.root=a=b", "a=b"),
        ("optim.rules={}", {}),
        ("model.pretrained=2024-01-01", "2024-01-01"),
    ],
)
def test_an_override_is_read_as_a_person_means_it(word: str, value: object) -> None:
    recipe = load_recipe("camvid-seaformer_b-ssa", [word])
    section, key = word.partition("=")[0].split(".")
    got = getattr(getattr(recipe, section), key)
    assert got == value
    assert type(got) is type(value)


def test_overrides_create_sections_and_the_last_one_wins() -> None:
    arguments = ["loss.weights.spatial=0", "optim.rules.head.lr=5", "train.seed=1", "train.seed=2"]
    recipe = load_recipe("camvid-seaformer_b-ssa", arguments)
    assert recipe.loss.weights == {"spatial": 0}
    assert (recipe.optim.rules["head"].lr, recipe.optim.rules["norm"].decay, recipe.train.seed) == (5, 0, 2)


def test_extends_merges_sections_and_replaces_lists(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "name: base\n" + OWN)
    write(tmp_path, "quick.yaml", "train: {steps: 3, seed: 5}\n")
    (tmp_path / "sub").mkdir()
    heir = "extends: [../base.yaml, ../quick.yaml]\ntrain: {seed: 6}\ndata: {classes: [a, b], raw_to_train: null}\n"
    recipe = load_recipe(write(tmp_path / "sub", "heir.yaml", heir))
    assert (recipe.name, recipe.train.steps, recipe.train.seed) == ("heir", 3, 6)
    assert (recipe.data.classes, recipe.data.root, recipe.data.raw_to_train) == (("a", "b"), "pictures", None)

    shipped = load_recipe(write(tmp_path, "more.yaml", "extends: demo\ntrain: {steps: 7}\n"))
    assert shipped.train.steps == 7
    assert shipped.model == load_recipe("demo").model


COCO = "dataset: coco_json, train: {images: i, annotations: a.json}, val: {images: i, annotations: b.json}"


def test_another_data_set_replaces_the_data_section(tmp_path: Path) -> None:
    base = write(
        tmp_path, "base.yaml", OWN.replace("root: pictures", "root: pictures\n  mean: [1, 2, 3]\n  cache: true")
    )
    other = load_recipe(write(tmp_path, "other.yaml", f"extends: {base}\ndata: {{dataset: ade20k, root: ade}}\n")).data
    assert (other.dataset, other.root, other.mean, other.cache) == ("ade20k", "ade", (1, 2, 3), True)
    assert (other.classes, other.train, other.raw_to_train) == ((), None, None)
    coco = load_recipe(write(tmp_path, "coco.yaml", f"extends: camvid-seaformer_b-ssa\ndata: {{{COCO}}}\n"))
    assert coco.data.train is not None
    assert (coco.data.train.masks, coco.data.palette, coco.data.root) == (None, None, ".")
    assert coco.optim == load_recipe("camvid-seaformer_b-ssa").optim
    again = load_recipe(write(tmp_path, "again.yaml", f"extends: {base}\ndata: {{dataset: folder, root: x}}\n")).data
    assert (again.root, again.classes) == ("x", ("cat", "dog", "1e3")), "the base's data set is folder, though unsaid"
    data = load_recipe("camvid-seaformer_b-ssa", ["data.root=ade", "data.dataset=ade20k"]).data
    assert (data.dataset, data.root, data.classes) == ("ade20k", "ade", ())


def test_keys_missing_for_another_data_set_are_reported_in_the_users_file(tmp_path: Path) -> None:
    own = write(tmp_path, "own.yaml", "extends: camvid-seaformer_b-ssa\ndata: {dataset: coco_json}\n")
    message = refusal(own)
    assert message.startswith(f"{own}:2: data.train: expected the folders of the split")


def test_other_classes_drop_a_palette_of_another_length(tmp_path: Path) -> None:
    camvid = load_recipe("camvid-seaformer_b-ssa").data
    own = load_recipe(write(tmp_path, "own.yaml", "extends: camvid-seaformer_b-ssa\ndata: {classes: [a, b]}\n")).data
    assert (own.classes, own.palette, own.train) == (("a", "b"), None, camvid.train)
    renamed = [f"c{number}" for number in range(11)]
    data = load_recipe("camvid-seaformer_b-ssa", [f"data.classes=[{','.join(renamed)}]"]).data
    assert (list(data.classes), data.palette) == (renamed, camvid.palette)
    assert "expected 2 colours" in refusal("camvid-seaformer_b-ssa", "data.classes=[a,b]", "data.palette=[[0,0,0]]")


def test_a_default_that_the_data_set_does_not_use_is_refused_but_stored_recipes_load(tmp_path: Path) -> None:
    message = refusal("ade20k-seaformer_b-ssa", "data.reduce_zero_label=false")
    assert "data.reduce_zero_label: expected no value, since dataset is ade20k" in message
    recipe = load_recipe("ade20k-seaformer_b-ssa")
    stored = json.loads(json.dumps(recipe.model_dump(mode="json")))
    del stored["data"]["background"]  # a key that came later
    assert parse_recipe(stored, "best.safetensors") == recipe
    earlier = [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"]  # the default was a shorter list
    stored["data"]["image_suffixes"] = earlier
    assert parse_recipe(stored, "best.safetensors").data.image_suffixes == tuple(earlier)
    assert load_recipe(write(tmp_path, "config.yaml", dump_recipe(recipe)), ["train.steps=1"]).data == recipe.data


def test_extends_that_goes_in_a_circle_or_nowhere(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    path = write(tmp_path, "b.yaml", "# b\nextends: a.yaml\n")
    assert "extends itself: b.yaml -> a.yaml -> b.yaml" in refusal(path)
    assert "c.yaml:1: extends: " in refusal(write(tmp_path, "c.yaml", "extends: gone.yaml\n"))
    assert "did you mean demo?" in refusal(write(tmp_path, "d.yaml", "extends: demoo\n"))
    assert "a list of them, got 3" in refusal(write(tmp_path, "e.yaml", "extends: 3\n"))


def test_standalone_text_needs_no_other_file(tmp_path: Path) -> None:
    assert standalone_text("demo") == recipe_file("demo").read_text(encoding="utf-8")
    copy = load_recipe(write(tmp_path, "copy.yaml", standalone_text("camvid-seaformer_b-ssa")))
    assert copy == load_recipe("camvid-seaformer_b-ssa").model_copy(update={"name": "copy"})
    assert "extends" not in (tmp_path / "copy.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("optim.lrr=1", ["unknown key optim.lrr", "did you mean optim.lr?"]),
        ("optim.Lr=1", ["unknown key optim.Lr", "did you mean optim.lr?"]),
        ("lr=1", ["unknown key lr", "did you mean optim.lr?"]),
        ("optim.foo=1", ["unknown key optim.foo", "known keys of optim: kind, lr, weight_decay"]),
        ("optim.rules.head.lrr=1", ["optim.rules.head.lrr", "did you mean optim.rules.head.lr?"]),
        ("optim.lr=-1", ["optim.lr: expected a number above 0, got -1"]),
        ("optim.lr=fast", ["optim.lr: expected a number, got 'fast'", "base learning rate"]),
        ("optim.lr=.nan", ["optim.lr: expected a finite number"]),
        ("optim.min_lr=1", ["optim.min_lr", "at most optim.lr, 0.00025"]),
        ("optim.betas=[0.9,1]", ["optim.betas[1]: expected a number below 1"]),
        ("train.steps=0", ["train.steps: expected 1 or more, got 0"]),
        ("train.steps=1000000000", ["train.steps: expected 1e+08 or less"]),
        ("train.steps=1.5", ["train.steps: expected a whole number, got 1.5"]),
        ("train.steps=", ["train.steps: expected a whole number, got nothing"]),
        ("train.batch=true", ["train.batch: expected a whole number, got True"]),
        ("train.amp=fp8", ["train.amp", "'off', 'bf16' or 'fp16'"]),
        ("train=3", ["train: expected a section"]),
        ("train.micro_batch=3", ["a divisor of train.batch, 16, got 3", "4, 8, null"]),
        ("train.micro_batch=2", ["a multiple of distill.group, 4, got 2", "4, 8, null"]),
        ("train={steps: 9, batch: 4, micro_batch: 2}", ["use train.micro_batch=null, or distill.group=2"]),
        ("augment.ratio=[2,0.5]", ["augment.ratio: expected [lowest, highest]", "[2.0, 0.5]"]),
        ("augment.crop=[360]", ["augment.crop: expected a longer list, got [360]", "[height, width]"]),
        ("augment.crop=[1,2,3]", ["augment.crop: expected a list of 2"]),
        ("augment.crop=480", ["augment.crop: expected a list, got 480"]),
        ("augment.crop=[16,480]", ["augment.crop[0]: expected 32 or more, got 16"]),
        ("augment.flip=2", ["augment.flip: expected 1 or less"]),
        ("data.classes=7", ["data.classes: expected a list, got 7"]),
        ("data.classes=[a,2]", ["data.classes[1]: expected text (in quotes"]),
        ("data.classes=[a,a]", ["each class name once, got 'a'"]),
        ("data.classes=[a]", ["2 to 255 names, got 1"]),
        ("data.palette=[[1,2,3]]", ["11 colours, one per class, got 1"]),
        ("data.ignore_index=3", ["data.ignore_index", "not a class (0..10 are classes)"]),
        ("data.raw_to_train={0: 11}", ["data.raw_to_train.0", "0..10"]),
        ("data.raw_to_train={x: 1}", ["data.raw_to_train.x: expected a whole number"]),
        ("data.train=", ["data.train: expected the folders of the split"]),
        ("data.dataset=synthetic", ["data.synthetic: expected the scenes' size", "{height: 160"]),
        ("data.image_suffixes=[JPG]", ["data.image_suffixes", "write '.jpg'"]),
        ("name=a/b", ["name: expected text without slashes"]),
        ("name=..", ["name: expected text without slashes"]),
        ("data.palette.0=5", ["has no keys that could be set", "set the whole list"]),
        ("optim.lr.x=5", ["0.00025 has no keys that could be set"]),
        ("optim.lr", ["expected key=value"]),
        ("=3", ["expected key=value"]),
        ("augment.crop=[360,", ["augment.crop=[360,: not valid YAML"]),
        ("data.root=&a [*a]", ["contains itself"]),
        ("extends=demo", ["only be written in a file"]),
    ],
)
def test_a_wrong_override_is_answered_with_key_value_and_mend(word: str, parts: list[str]) -> None:
    message = refusal("camvid-seaformer_b-ssa", word)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["bad.yaml: the recipe is empty"]),
        ("# only a comment\n", ["the recipe is empty"]),
        ("- a\n- b\n", ["expected `key: value` lines", "recipes show demo"]),
        ("just words\n", ["expected `key: value` lines", "just words"]),
        ("model: {name: a\n", ["bad.yaml:2: not valid YAML", "indented with spaces"]),
        ("model:\n\tname: a\n", ["bad.yaml:2: not valid YAML"]),
        ("model: a\n---\nmodel: b\n", ["not valid YAML", "document"]),
        ("model: \x07\n", ["not valid YAML"]),
        (OWN + "optim: {lr: 1}\n", ["bad.yaml:11: optim is given twice, first on line 9", "remove one"]),
        (OWN.replace("steps: 10", "steps: 10, steps: 11"), ["bad.yaml:10: train.steps is given twice"]),
        ("[a, b]: 1\n", ["a key must be text or a number"]),
        (OWN.replace("steps", "step"), ["bad.yaml:10: unknown key train.step", "did you mean train.steps?"]),
        (OWN.replace("lr: 1e-3", "lr: -1"), ["bad.yaml:9: optim.lr: expected a number above 0"]),
        (OWN.replace("lr: 1e-3, ", ""), ["bad.yaml:9: optim.lr is missing", "base learning rate"]),
        (
            OWN.replace("crop", "corp").replace("10}", "-1}"),
            ["bad.yaml:8: unknown key augment.corp", "3 more"],
        ),
        ("model: {name: a}\n", ["bad.yaml: data is missing", "3 more problems"]),
        (OWN + "  workers: 1\n", ["not valid YAML"]),
        (
            OWN.replace("raw_to_train", "reduce_zero_label: true\n  raw_to_train"),
            ["bad.yaml:7: data.reduce_zero_label"],
        ),
    ],
)
def test_a_wrong_file_is_answered_with_its_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = refusal(write(tmp_path, "bad.yaml", text))
    for part in parts:
        assert part in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "did you mean demo?" in refusal("dmo")
    assert " ade20k-seaformer_b-ssa " in refusal("ade20k-seaformer-ssa")
    assert "`ssaseg recipes list` prints the shipped recipes" in refusal("zzz")
    assert "the name of the recipe is empty" in refusal("")
    assert "`extends: _camvid`" in refusal("_camvid")
    assert "demo.yaml: no such file" in refusal(str(tmp_path / "demo.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    assert "folder.yaml: a folder, expected a recipe" in refusal(str(tmp_path / "folder.yaml"))
    (tmp_path / "latin.yaml").write_bytes("model: é".encode("latin-1"))
    assert "not UTF-8" in refusal(str(tmp_path / "latin.yaml"))


def test_a_recipe_in_a_checkpoint_is_told_by_its_file() -> None:
    data = load_recipe("demo").model_dump(mode="json")
    del data["optim"]["lr"]
    with pytest.raises(RecipeError, match=r"best\.safetensors: optim\.lr is missing"):
        parse_recipe(data, "best.safetensors")


def test_synthetic_scenes_bring_their_own_classes() -> None:
    assert "the data set does not use it" in refusal("demo", "data.classes=[a,b]")


def test_a_folder_for_drawn_scenes_is_refused() -> None:
    message = refusal("demo", "data.root=photos")
    assert "data.root: expected no folder, since dataset is synthetic" in message
    assert "got 'photos'" in message


def test_every_key_says_what_it_means() -> None:
    recipe = load_recipe("demo")
    kinds: list[type[BaseModel]] = [Recipe, Synthetic, Folders, Rule]
    kinds += [type(value) for _, value in recipe if isinstance(value, BaseModel)]
    fields = [(f"{kind.__name__}.{name}", field) for kind in kinds for name, field in kind.model_fields.items()]
    assert len(fields) > 60
    assert [name for name, field in fields if not field.description] == []


def test_a_stored_recipe_may_have_the_weights_of_losses_in_distill() -> None:
    """As checkpoints have it that were written before they moved to `loss`."""
    stored = load_recipe("demo").model_dump(mode="json")
    stored["distill"] = {"group": 2, "weights": {"main_ce": 1.0, "semantic": 10.0}}
    del stored["loss"]["weights"]
    recipe = parse_recipe(stored, "old.safetensors")
    assert (recipe.distill.group, recipe.loss.weights) == (2, {"main_ce": 1.0, "semantic": 10.0})
    assert recipe.loss.label_smoothing == 0
    with pytest.raises(RecipeError, match=r"unknown key distill\.weights"):
        load_recipe("demo", ["distill.weights.semantic=0"])


# ---- images of other than three channels -----------------------------------------------------------------------------


def test_mean_and_std_have_a_number_for_each_channel(tmp_path: Path) -> None:
    """The fix has numbers to copy: of ImageNet's colours, and their mean for each further channel."""
    path = write(tmp_path, "own.yaml", OWN)
    assert load_recipe(path).data.channels == 3
    assert "data.mean" in (text := refusal(path, "data.channels=4"))
    assert "expected 4 numbers, since data.channels is 4" in text
    usual = "[123.675, 116.28, 103.53, 114.495]"
    assert usual in text
    assert "expected 4 numbers" in (text := refusal(path, "data.channels=4", f"data.mean={usual}"))
    assert "data.std" in text
    four = load_recipe(path, ["data.channels=4", f"data.mean={usual}", "data.std=[1,2,3,4]"])
    assert four.data.std == (1, 2, 3, 4)
    assert load_recipe(write(tmp_path, "again.yaml", dump_recipe(four))).data == four.data
    assert "[114.495]" in refusal(path, "data.channels=1")
    assert load_recipe(path, ["data.channels=1", "data.mean=[9]", "data.std=[7]"]).data.mean == (9,)
    assert "data.mean" in refusal(path, "data.mean=[1,2]")


def test_channels_of_which_there_are_none(tmp_path: Path) -> None:
    path = write(tmp_path, "own.yaml", OWN)
    for wrong in ("0", "17", "true", "2.5"):
        assert "data.channels" in refusal(path, f"data.channels={wrong}")
    for name in ("demo", "ade20k-seaformer_b-ssa"):  # scenes and published data sets have three
        words = ["data.channels=1", "data.mean=[9]", "data.std=[7]"]
        assert "data.channels: expected no value, since dataset is " in refusal(name, *words), name


def test_a_run_from_before_channels_can_be_read_again() -> None:
    stored = json.loads(load_recipe("demo").model_dump_json())
    del stored["data"]["channels"]
    assert parse_recipe(stored, "run").data.channels == 3
