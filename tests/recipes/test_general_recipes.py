"""Recipes of FCN, OCRNet, SegFormer, UPerNet: official values, and the rate and decay of each parameter.

`fixtures/general_recipes.json` is a copy of the official configurations' values, resolved, with the keys of
`official_recipes.json` (see `test_published_recipes.py`); `opt` is the whole optimiser, `with_cp` checkpointing.
"""

import json
import re
from functools import cache
from typing import Any

import pytest
import torch
from places import TESTS

from ssaseg.cli.training.optimiser import param_groups
from ssaseg.datasets.labels import label_space
from ssaseg.datasets.published import LAYOUTS
from ssaseg.models import Segmenter, facts
from ssaseg.models.build import build_outline
from ssaseg.models.official import official_keys
from ssaseg.recipes import Recipe, list_recipes, load_recipe, recipe_file

OFFICIAL = json.loads((TESTS / "fixtures" / "general_recipes.json").read_text())
DATA_SETS = {150: "ade20k", 171: "coco_stuff10k", 59: "pascal_context_59"}
NETWORKS = {
    ("HRNet", 18): "ocrnet_hr18",
    ("HRNet", 48): "ocrnet_hr48",
    ("MixVisionTransformer", 32): "segformer_b0",
    ("MixVisionTransformer", 64): "segformer_b5",
    ("SwinTransformer", 96): "upernet_swin_t",
    ("SwinTransformer", 128): "upernet_swin_b",
    ("SwinTransformer", 192): "upernet_swin_l",
    ("ViTAdapter", 1024): "upernet_vit_adapter_l",
}
# mmsegmentation's names and addresses → the files that they stand for.
FILES = {
    "open-mmlab://msra/hrnetv2_w18": "ckpts/hrnetv2_w18-00eb2006.pth",
    "https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segformer/mit_b0_20220624-7e0fe6dd.pth": (
        "ckpts/mit_b0_20220624-7e0fe6dd.pth"
    ),
}
OF_THE_DATA = ("crop", "scale", "test_scale", "r2m", "test_cfg", "mean", "std", "iters", "ckpt", "ev")
RECIPES = [
    f"{data}-{network}-{classifier}"
    for data in DATA_SETS.values()
    for network in ("fcn_r101", *NETWORKS.values())
    for classifier in ("linear", "ssa")
]


def recipe_of(config: str) -> str:
    """The recipe for an official configuration, found by the values in it."""
    values = OFFICIAL["configs"][config]
    classifier = "ssa" if values["head"].endswith("_ssa") else "linear"
    return f"{DATA_SETS[values['ncls']]}-{NETWORKS[values['backbone'], values['width']]}-{classifier}"


CONFIGS = {recipe_of(config): config for config in OFFICIAL["configs"]}


def values_of(name: str) -> dict[str, Any]:
    """The official values for a recipe. If it is derived: its network's on ADE20K or COCO, and the data set's."""
    if name in CONFIGS:
        return {**OFFICIAL["common"], **OFFICIAL["configs"][CONFIGS[name]]}
    data, network, _ = name.split("-")
    if network == "fcn_r101":  # mmsegmentation's schedule is OCRNet's
        return {**values_of(f"{data}-ocrnet_hr18-linear"), "init": "ckpts/resnet101_v1c-e67eebb6.pth", "dropout": 0.1}
    if network == "ocrnet_hr18":
        return values_of(f"{data}-ocrnet_hr18-linear")
    own, other = {
        "segformer_b0": ("ade20k-segformer_b0-linear", f"{data}-ocrnet_hr18-linear"),
        "upernet_swin_b": ("coco_stuff10k-upernet_swin_b-linear", f"{data}-upernet_swin_t-linear"),
    }[network]
    on_data = values_of(other)
    return values_of(own) | {key: on_data[key] for key in OF_THE_DATA}


def wanted(name: str) -> dict[str, Any]:
    """The expected values of recipe `name`: section.key → value."""
    values = values_of(name)
    opt, schedule, test = values["opt"], values["lrcfg"], values["test_cfg"]
    rules = opt.get("paramwise_cfg", {})
    adamw = opt["type"] == "AdamW"
    custom = rules.get("custom_keys", {})
    return {
        "model.pretrained": FILES.get(values["init"], values["init"]),
        "model.drop_path": values["drop_path"],
        "model.dropout": max(values["dropout"], 0.0),
        "data.mean": tuple(values["mean"]),
        "data.std": tuple(values["std"]),
        "augment.scale": tuple(values["scale"]),
        "augment.ratio": tuple(values["ratio_range"]),
        "augment.crop": tuple(values["crop"]),
        "augment.cat_max_ratio": values["cat_max_ratio"],
        "augment.flip": values["flip"],
        "augment.distortion": True,
        "test.scale": tuple(values["test_scale"]),
        "test.multiple": 32 if values["r2m"] else None,
        "test.mode": test["mode"],
        "test.crop": tuple(test["crop_size"]) if "crop_size" in test else None,
        "test.stride": tuple(test["stride"]) if "stride" in test else None,
        "test.ratios": (1.0,),
        "test.flip": False,
        "optim.kind": opt["type"].lower(),
        "optim.lr": opt["lr"],
        "optim.weight_decay": opt["weight_decay"],
        "optim.betas": tuple(opt["betas"]) if adamw else (0.9, 0.999),
        "optim.momentum": opt.get("momentum", 0.9),
        "optim.rules": {key: (rule.get("lr_mult", 1), rule.get("decay_mult", 1)) for key, rule in custom.items()},
        "optim.layer_decay": rules.get("layer_decay_rate"),
        "optim.decay_vectors": "constructor" not in opt,  # the layer-wise constructor does not decay vectors
        "optim.warmup": schedule.get("warmup_iters", 0),
        "optim.warmup_ratio": schedule.get("warmup_ratio", 1e-6),
        "optim.power": schedule["power"],
        "optim.min_lr": schedule["min_lr"],
        "optim.grad_clip": None,
        "train.steps": values["iters"],
        "train.batch": OFFICIAL["gpus"] * values["spg"],
        "train.workers": values["wpg"],
        "train.eval_every": values["ev"],
        "train.save_every": values["ckpt"],
        "train.checkpointing": bool(values["with_cp"]),
        "train.amp": "bf16",
        "distill.group": values["spg"],
    }


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_the_official_values(name: str) -> None:
    recipe = load_recipe(name, (), facts)
    assert name.split("-") == [recipe.data.dataset, recipe.model.name, recipe.model.classifier]
    expected = wanted(name)
    found = {key: getattr(getattr(recipe, key.split(".")[0]), key.split(".")[1]) for key in expected}
    found["optim.rules"] = {key: (rule.lr, rule.decay) for key, rule in recipe.optim.rules.items()}
    assert found == expected


def test_every_configuration_has_its_recipe() -> None:
    assert (len(RECIPES), len(CONFIGS)) == (54, 38)
    assert set(CONFIGS) < set(RECIPES) <= set(list_recipes())
    assert set(OFFICIAL["miou"]) < set(CONFIGS)
    assert len(OFFICIAL["miou"]) == 15
    mean = {name: load_recipe(name).data.mean for name in RECIPES if "vit" in name}  # see spec: only ADE20K's differs
    assert {name.split("-")[0] for name in mean if mean[name] == (127.5,) * 3} == {"ade20k"}


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_says_what_is_known(name: str) -> None:
    recipe = load_recipe(name)
    space = label_space(LAYOUTS[recipe.data.dataset].labels)
    lines = recipe_file(name).read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    assert max(map(len, lines)) <= 120
    header = " ".join(line.lstrip("# ") for line in lines)
    height, width = recipe.augment.crop
    assert lines[0].endswith(f"({len(space.classes)} classes, {height}x{width}).")
    assert f"{recipe.train.steps:,} steps of {recipe.train.batch} images" in header
    assert f" {recipe.data.root} (or data.root=DIR)" in header
    assert f" {recipe.model.pretrained} from " in header
    assert "This recipe uses bfloat16" in header
    assert "not measured yet" in header
    claimed = [float(figure) for figure in re.findall(r"(\d+\.\d+) %", header)]
    assert claimed == ([OFFICIAL["miou"][name]] if name in OFFICIAL["miou"] else [])
    assert ("no published score that we know of" in header) == (not claimed)
    assert ("derived, since there is no official configuration" in header) == (name not in CONFIGS)
    if name in CONFIGS:
        assert f"Source: SSA-Seg's configs/{CONFIGS[name]}." in re.sub(" +", " ", header)
    else:
        named = re.findall(r"configs/([\w/.-]+\.py)", header)
        assert named
        assert all(config in OFFICIAL["configs"] or config.startswith("_base_/") for config in named)


# ---- rates and decays --------------------------------------------------------------------------------------------

SMALL = ("fcn_r101", "ocrnet_hr18", "segformer_b0", "upernet_swin_t", "upernet_vit_adapter_l")


@cache
def built(name: str) -> tuple[Recipe, Segmenter]:
    """A recipe on ADE20K and its network, without memory for the weights."""
    recipe = load_recipe(name)
    return recipe, build_outline(recipe.model.name, 150, recipe.model.classifier)


def factors(network: str, key: str, parameter: torch.Tensor) -> tuple[float, float]:
    """(rate, decay) of an official name, as the rules of the official configurations work out."""
    if network.startswith("segformer"):
        if "head" in key:
            return 10.0, 1.0  # norms too
        return 1.0, 0.0 if "norm" in key else 1.0
    if network.startswith("upernet_swin"):
        return 1.0, 0.0 if "norm" in key or "relative_position_bias_table" in key else 1.0
    if network.startswith("upernet_vit"):
        vector = parameter.dim() == 1 or key.endswith(".bias")
        block = re.match(r"backbone\.blocks\.(\d+)\.", key)
        layer = int(block[1]) + 1 if block else 0 if key.startswith(("backbone.patch_embed", "backbone.pos_")) else 25
        return 0.95 ** (25 - layer), 0.0 if vector else 1.0
    return 1.0, 1.0


# Official name → (rate, decay), and how many groups there are: what is easily got wrong.
CONSEQUENCES: dict[str, tuple[int, dict[str, tuple[float, float]]]] = {
    "fcn_r101": (1, {"backbone.stem.1.weight": (1, 1), "auxiliary_head.conv_seg.weight": (1, 1)}),
    "ocrnet_hr18": (1, {"backbone.bn1.weight": (1, 1), "decode_head.1.bottleneck.conv.weight": (1, 1)}),
    "segformer_b0": (3, {
        "decode_head.convs.0.bn.weight": (10, 1),
        "backbone.layers.0.0.norm.weight": (1, 0),
        "backbone.layers.0.1.0.attn.norm.bias": (1, 0),
        "backbone.layers.0.1.0.attn.attn.in_proj_bias": (1, 1),
    }),
    "upernet_swin_t": (2, {
        "decode_head.psp_modules.0.1.bn.weight": (1, 1),
        "auxiliary_head.convs.0.bn.bias": (1, 1),
        "backbone.norm0.weight": (1, 0),
        "backbone.patch_embed.norm.bias": (1, 0),
        "backbone.stages.0.downsample.norm.weight": (1, 0),
        "backbone.stages.1.blocks.0.attn.w_msa.relative_position_bias_table": (1, 0),
    }),
    "upernet_vit_adapter_l": (26 * 2, {
        "backbone.pos_embed": (0.95**25, 1),
        "backbone.patch_embed.proj.bias": (0.95**25, 0),
        "backbone.blocks.0.gamma1": (0.95**24, 0),
        "backbone.blocks.23.mlp.fc1.weight": (0.95, 1),
        "backbone.level_embed": (1, 1),
        "backbone.interactions.0.injector.gamma": (1, 0),
        "backbone.norm1.weight": (1, 0),
        "decode_head.fpn_bottleneck.conv.weight": (1, 1),
    }),
}  # fmt: skip


@pytest.mark.parametrize("classifier", ["linear", "ssa"])
@pytest.mark.parametrize("network", SMALL)
def test_every_parameter_has_the_official_rate_and_decay(network: str, classifier: str) -> None:
    recipe, model = built(f"ade20k-{network}-{classifier}")
    groups, official = param_groups(model, recipe.optim), official_keys(model)
    own = dict(model.named_parameters())
    got = {
        official[ours]: (group["lr"] / recipe.optim.lr, group["weight_decay"] / recipe.optim.weight_decay)
        for group in groups
        for ours in group["names"]
    }
    assert len(got) == len(own)
    count, some = CONSEQUENCES[network]
    assert len(groups) == count
    assert {key: got[key] for key in some} == {key: pytest.approx(value) for key, value in some.items()}
    assert got == {official[ours]: pytest.approx(factors(network, official[ours], each)) for ours, each in own.items()}
    if network == "upernet_vit_adapter_l" and classifier == "ssa":
        assert got["decode_head.center_pos.weight"] == pytest.approx((1, 1))
