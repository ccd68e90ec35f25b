"""Recipes of published results: every official value, every parameter's rate and decay, and nothing written twice.

`fixtures/official_recipes.json` is a copy of the official configurations' values, resolved. Its keys: `ncls` classes,
`rzl` reduce_zero_label, `r2m` ResizeToMultiple(32), `custom` the optimiser's custom_keys, `lrcfg` lr_config, `spg` and
`wpg` samples and workers per GPU, `ckpt` and `ev` intervals of saving and evaluating, `init` the ImageNet file, `ac`
align_corners, `channels` the classifier's input, `ham` arguments of SegNeXt's decoder, `norm` the decoder's norm,
`fup` find_unused_parameters, `repeat` the training set's class.
"""

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from places import TESTS
from torch import nn

from ssaseg.cli.main import cli
from ssaseg.cli.training.optimiser import param_groups
from ssaseg.datasets.labels import label_space
from ssaseg.datasets.published import LAYOUTS
from ssaseg.models import Segmenter
from ssaseg.models.build import build_outline
from ssaseg.models.layers import DropPath
from ssaseg.models.official import official_keys
from ssaseg.recipes import Recipe, list_recipes, load_recipe, recipe_file


def family_name(network: str) -> str:
    return network.rpartition("_")[0]


OFFICIAL = json.loads((TESTS / "fixtures" / "official_recipes.json").read_text())
GOLDEN = {
    "afformer_b": "afformer_base",
    "cgrseg_b": "cgrseg_b",
    "seaformer_b": "seaformer_base",
    "segnext_t": "segnext_tiny",
}

# What identifies the network of an official configuration: its backbone, and the classifier's input (its size).
NETWORKS = {
    ("afformer_base", 256): "afformer_b",
    ("SeaFormer", 160): "seaformer_b",
    ("MSCAN", 256): "segnext_t",
    ("SeaFormer", 192): "seaformer_l",
    ("MSCAN", 1024): "segnext_l",
    ("efficientformerv2_s2_feat", 256): "cgrseg_b",
    ("efficientformerv2_l_feat", 256): "cgrseg_l",
}
HEADS = {"afformer": "CLS", "cgrseg": "CGRSeg", "seaformer": "LightHead", "segnext": "LightHamHead"}
DATA_SETS = {150: "ade20k", 171: "coco_stuff10k", 59: "pascal_context_59"}
OF_THE_DATA = ("ncls", "crop", "scale", "rzl", "test_scale", "r2m", "iters")
NOT_IN_A_RECIPE = {
    "opt": "the loop has AdamW alone",
    "ac": "the networks' own, held by their figures",
    "fup": "for training in several processes",
    "repeat": "epochs do not restart here, which is what RepeatDataset is for",
    "fp16": "train.amp, which is ours",
    "norm.requires_grad": "the networks' own",
    "lrcfg.policy": "the schedule has this one alone",
    "lrcfg.warmup": "the schedule has this one alone",
    "lrcfg.by_epoch": "the schedule has this one alone",
    "ev.metric": "all metrics are computed",
    "ev.pre_eval": "how memory is saved in the official code",
}
# Values compared of one recipe. GroupNorm has groups, AFFormer has no rules, SegNeXt's decoder has bases.
COMPARED = {"afformer": 37, "cgrseg": 42, "seaformer": 42, "segnext": 44}


# ---- what is wanted ----------------------------------------------------------------------------------------------


def values_of(config: str) -> dict[str, Any]:
    """All values of an official configuration; of one that builds on a missing file, those that it evidently means."""
    if config in OFFICIAL["broken"]:
        meant = values_of(f"{Path(config).parent}/{OFFICIAL['broken'][config]['meant']}")
        return {**meant, "head": f"{meant['head']}_ssa"}  # all that any official ssa configuration changes
    return {**OFFICIAL["common"], **OFFICIAL["configs"][config]}


def recipe_of(config: str) -> str:
    """The recipe for an official configuration, found by the values in it."""
    values = values_of(config)
    classifier = "ssa" if values["head"].endswith("_ssa") else "linear"
    return f"{DATA_SETS[values['ncls']]}-{NETWORKS[values['backbone'], values['channels']]}-{classifier}"


CONFIGS = {recipe_of(config): config for config in [*OFFICIAL["configs"], *OFFICIAL["broken"]]}
RECIPES = [
    f"{data}-{net}-{kind}" for data in DATA_SETS.values() for net in NETWORKS.values() for kind in ("linear", "ssa")
]
DERIVED = sorted(set(RECIPES) - set(CONFIGS))


def flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return found


def wanted(name: str) -> dict[str, Any]:
    """The expected values of recipe `name`, with official keys; if derived: those of network and data set."""
    data, network, classifier = name.split("-")
    if name in CONFIGS:
        values = values_of(CONFIGS[name])
    else:
        on_data = values_of(CONFIGS[f"{data}-seaformer_l-{classifier}"])
        values = values_of(CONFIGS[f"ade20k-{network}-{classifier}"]) | {key: on_data[key] for key in OF_THE_DATA}
    values = {**values, **OFFICIAL["pipeline"], "root": OFFICIAL["datasets"][data]["root"]}
    if values["drop_path"] is None:
        values["drop_path"] = OFFICIAL["drop_path_of_backbone"][values["backbone"]]
    if network == "segnext_l":
        values["ham"] = {"MD_R": 64}  # the decoder's own, where the configuration is silent
    if not values["ham"]:
        del values["ham"]
    values["batch"] = OFFICIAL["gpus"] * values.pop("spg")
    rules = values.pop("custom") or {}
    values["custom"] = {key: {"lr_mult": 1.0, "decay_mult": 1.0} | rule for key, rule in rules.items()}
    return {key: value for key, value in flat(values).items() if key not in NOT_IN_A_RECIPE}


# ---- the values of our recipes -------------------------------------------------------------------------------------


@cache
def built(name: str) -> tuple[Recipe, Segmenter]:
    """A recipe and its network, without memory for the weights."""
    recipe = load_recipe(name)
    classes = label_space(LAYOUTS[recipe.data.dataset].labels).classes
    model = build_outline(
        recipe.model.name,
        len(classes),
        recipe.model.classifier,
        drop_path=recipe.model.drop_path,
        dropout=recipe.model.dropout,
    )
    assert all(parameter.is_meta for parameter in model.parameters())
    return recipe, model


def values_of_recipe(name: str) -> dict[str, Any]:
    """The values of the recipe `name` and its network, with official keys."""
    recipe, model = built(name)
    layout, network = LAYOUTS[recipe.data.dataset], recipe.model.name
    (backbone, channels), *_ = [mark for mark, ours in NETWORKS.items() if ours == network]
    groups = [layer.num_groups for layer in model.decoder.modules() if isinstance(layer, nn.GroupNorm)]
    batch_norms = any(isinstance(layer, nn.BatchNorm2d) for layer in model.decoder.modules())
    assert channels == model.classifier.channels
    values = {
        "backbone": backbone,
        "head": HEADS[family_name(network)] + ("_ssa" if recipe.model.classifier == "ssa" else ""),
        "channels": model.classifier.channels,
        "norm": {"type": "GN", "num_groups": max(groups)} if not batch_norms else {"type": "SyncBN"},
        "drop_path": round(max(layer.rate for layer in model.modules() if isinstance(layer, DropPath)), 9),
        "dropout": model.classifier.dropout.p,
        "init": recipe.model.pretrained,
        "ncls": model.num_classes,
        "rzl": layout.reduce_zero_label,
        "root": recipe.data.root,
        "mean": list(recipe.data.mean),
        "std": list(recipe.data.std),
        "scale": list(recipe.augment.scale),
        "ratio_range": list(recipe.augment.ratio),
        "crop": list(recipe.augment.crop),
        "cat_max_ratio": recipe.augment.cat_max_ratio,
        "flip": recipe.augment.flip,
        "distortion": "PhotoMetricDistortion" if recipe.augment.distortion else None,
        "test_scale": list(recipe.test.scale or ()),
        "r2m": {32: True, None: False}[recipe.test.multiple],
        "test_mode": recipe.test.mode,
        "test_ratios": list(recipe.test.ratios),
        "test_flip": recipe.test.flip,
        "lr": recipe.optim.lr,
        "wd": recipe.optim.weight_decay,
        "betas": list(recipe.optim.betas),
        "custom": {key: {"lr_mult": rule.lr, "decay_mult": rule.decay} for key, rule in recipe.optim.rules.items()},
        "lrcfg": {
            "warmup_iters": recipe.optim.warmup,
            "warmup_ratio": recipe.optim.warmup_ratio,
            "power": recipe.optim.power,
            "min_lr": recipe.optim.min_lr,
        },
        "grad_clip": recipe.optim.grad_clip,
        "iters": recipe.train.steps,
        "batch": recipe.train.batch,
        "wpg": recipe.train.workers,
        "ckpt": recipe.train.save_every,
        "ev": {"interval": recipe.train.eval_every},
    }
    if network.startswith("segnext"):
        values["ham"] = {"MD_R": model.decoder.rank}
    return flat(values)


# ---- the tests ---------------------------------------------------------------------------------------------------


def test_every_official_configuration_has_its_recipe() -> None:
    assert (len(OFFICIAL["configs"]), len(OFFICIAL["broken"]), len(CONFIGS)) == (32, 2, 34)
    assert len(DERIVED) == 8
    assert {name.split("-")[1] for name in DERIVED} == {"cgrseg_b", "cgrseg_l"}
    assert sorted(RECIPES) == [
        name
        for name in list_recipes()
        if set(name.split("-")) & set(NETWORKS.values())
        and name.startswith(tuple(DATA_SETS.values()))
        and name.endswith(("-linear", "-ssa"))  # the rivals' are in test_rival_recipes.py
    ]
    assert set(OFFICIAL["miou"]) < set(CONFIGS)
    assert len(OFFICIAL["miou"]) == 28


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_the_official_values(name: str) -> None:
    found = values_of_recipe(name)
    assert found == wanted(name)
    assert len(found) == COMPARED[family_name(name.split("-")[1])]


def test_how_many_values_were_compared() -> None:
    assert sum(len(wanted(name)) for name in CONFIGS) == 6 * 37 + 4 * 42 + 12 * 42 + 12 * 44 == 1422
    assert sum(len(wanted(name)) for name in DERIVED) == 8 * 42 == 336


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_ours_is_what_the_header_says(name: str) -> None:
    recipe, _ = built(name)
    space = label_space(LAYOUTS[recipe.data.dataset].labels)
    assert (recipe.train.amp, recipe.distill.group) == ("bf16", OFFICIAL["common"]["spg"])
    assert space.protocol == {"scale": list(recipe.test.scale or ()), "multiple": recipe.test.multiple}

    header = recipe_file(name).read_text(encoding="utf-8").split("\n\n")[0]
    lines = header.splitlines()
    height, width = recipe.augment.crop
    assert lines[0].endswith(f"({len(space.classes)} classes, {height}x{width}).")
    assert f"{recipe.train.steps:,} steps of {recipe.train.batch} images" in header
    assert f" {recipe.data.root} (or data.root=DIR)" in header
    assert f" {recipe.model.pretrained} from " in header
    assert "official runs used float32. This recipe uses bfloat16" in header
    assert "not measured yet" in header
    assert max(map(len, lines)) <= 120

    claimed = [float(figure) for figure in re.findall(r"(\d+\.\d+) %", header)]
    figures = [table[name] for table in (OFFICIAL["miou"], OFFICIAL["miou_readme"]) if name in table]
    assert claimed == figures
    assert ("no published score" in header) == (not figures)
    config = CONFIGS.get(name, CONFIGS[name.replace(recipe.data.dataset, "ade20k")])
    assert f"configs/{config}" in header
    assert ("derived, since there is no official configuration" in header) == (name in DERIVED)
    assert all(part in header for part in OFFICIAL["broken"].get(config, {}).values())


def test_missing_imagenet_weights_are_told_with_the_mend() -> None:
    result = CliRunner().invoke(cli, ["train", "demo", "model.pretrained=ckpts/none.pth", "--dry-run"])
    assert result.exit_code == 2
    told_lines = result.stderr.splitlines()
    assert len(told_lines) == 3
    assert "model.pretrained=ckpts/none.pth: no such checkpoint" in told_lines[0]
    assert "`ssaseg recipes show`" in told_lines[1]
    assert "model.pretrained=null" in told_lines[2]


# ---- rates and decays --------------------------------------------------------------------------------------------


def factors(parameter: str, custom: dict[str, Any]) -> tuple[float, float]:
    """mmcv 1.7's (rate, decay) for an official name, by the longest key in it; of equals, the alphabet's first."""
    found = sorted((-len(key), key) for key in custom if key in parameter)
    rule = custom[found[0][1]] if found else {}
    return rule.get("lr_mult", 1.0), rule.get("decay_mult", 1.0)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("ade20k")])
def test_every_parameter_has_the_official_rate_and_decay(name: str) -> None:
    recipe, model = built(name)
    custom = values_of(CONFIGS[name])["custom"] or {}
    official = official_keys(model)
    rules = dict(reversed(recipe.optim.rules.items()))  # the order in which they are written does not matter
    groups = param_groups(model, recipe.optim.model_copy(update={"rules": rules}))
    got = {
        official[ours]: (group["lr"] / recipe.optim.lr, group["weight_decay"] / recipe.optim.weight_decay)
        for group in groups
        for ours in group["names"]
    }
    assert len(got) == len(list(model.parameters()))
    assert got == {key: pytest.approx(factors(key, custom)) for key in got}
    if recipe.model.name in GOLDEN:  # the names are those of the official code
        rows = (TESTS / "golden" / f"{GOLDEN[recipe.model.name]}_keys.txt").read_text().splitlines()
        names = {key for which, key, *_ in map(str.split, rows) if which in ("both", recipe.model.classifier)}
        assert set(got) <= names
    consequences(
        recipe.model.name.partition("_")[0], {key: (round(rate), round(decay)) for key, (rate, decay) in got.items()}
    )


def consequences(kind: str, got: dict[str, tuple[int, int]]) -> None:
    """What follows from the rules, by the protocol: what learns ten times as fast and what does not decay."""
    if kind == "afformer":
        assert set(got.values()) == {(1, 1)}
        return
    assert {value for key, value in got.items() if key.startswith("decode_head.")} == {(10, 1)}  # its norms, too
    backbone = {key: value for key, value in got.items() if key.startswith("backbone.")}
    fast = {key for key, value in backbone.items() if value == (10, 1)}
    free = {key for key, value in backbone.items() if value == (1, 0)}
    if kind == "seaformer":  # its norms are called `bn`
        assert (fast, free) == (set(), {key for key in backbone if ".pos_emb_" in key})
    if kind == "segnext":
        assert (fast, free) == (set(), {key for key in backbone if "norm" in key})
        assert backbone["backbone.patch_embed1.proj.1.weight"] == (1, 1)  # a norm, by its number
    if kind == "cgrseg":
        assert fast == {key for key in backbone if ".talking_head" in key}
        assert free == {key for key in backbone if "norm" in key}
        assert backbone["backbone.patch_embed.1.weight"] == (1, 1)
    assert len(free) > 30


# ---- nothing twice -----------------------------------------------------------------------------------------------


@cache
def own(name: str) -> tuple[list[str], dict[str, Any]]:
    """A shipped file's bases and its own keys."""
    values = yaml.safe_load(recipe_file(name).read_text(encoding="utf-8"))
    bases = values.pop("extends", [])
    return [bases] if isinstance(bases, str) else bases, flat(values)


def inherited(name: str) -> dict[str, Any]:
    """What a file has before its own keys."""
    values: dict[str, Any] = {}
    for base in own(name)[0]:
        values |= inherited(base) | own(base)[1]
    return values


def chain(name: str) -> list[str]:
    """Every file that `name` is made of, itself last."""
    return [file for base in own(name)[0] for file in chain(base)] + [name]


def test_a_recipe_says_nothing_but_its_bases_and_its_classifier() -> None:
    assert {name: own(name)[1] for name in RECIPES} == {
        name: {"model.classifier": name.split("-")[2]} for name in RECIPES
    }
    assert len({tuple(own(name)[0]) for name in RECIPES}) == len(RECIPES) / 2  # a pair differs in its classifier alone


def test_no_file_repeats_what_its_bases_say_or_could_say() -> None:
    files = [path.stem for path in recipe_file("demo").parent.glob("*.yaml")]
    heirs: dict[str, list[str]] = {}
    for name in files:
        before: dict[str, Any] = {}
        for file in chain(name):
            repeated = {key for key, value in own(file)[1].items() if key in before and before[key] == value}
            assert not repeated, (name, file)
            before |= own(file)[1]
        for base in own(name)[0]:
            heirs.setdefault(base, []).append(name)
    unused = {name for name in files if name.startswith("_")} - set(heirs)
    assert not unused
    for base, names in heirs.items():
        held = Counter((key, str(value)) for name in names for key, value in own(name)[1].items())
        everywhere = [pair for pair, count in held.items() if count == len(names) > 1]
        assert not everywhere, f"all of {names} say this, {base} could"
