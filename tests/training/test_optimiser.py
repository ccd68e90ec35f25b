"""The learning rate of every parameter over 2,000 steps, held against a trace that mmcv 1.7.2 itself made.

How `fixtures/mmcv_lr.json` was made, and its keys: `fixtures/make_mmcv_lr.py`.
"""

import hashlib
import json
import struct
from fnmatch import fnmatchcase

import pytest
import torch
from places import TESTS

from ssaseg.cli.training.optimiser import learning_rate, param_groups
from ssaseg.models import build_model
from ssaseg.models.official import aliases, left_out, official_keys
from ssaseg.recipes import Recipe, load_recipe

TRACES = json.loads((TESTS / "fixtures" / "mmcv_lr.json").read_text())
STEPS = TRACES["steps"]
RECIPES = {
    "afformer_base": "ade20k-afformer_b-ssa",
    "cgrseg_b": "ade20k-cgrseg_b-ssa",
    "seaformer_base": "ade20k-seaformer_b-ssa",
    "segnext_tiny": "ade20k-segnext_t-ssa",
}
# What the shipped recipe is told, so that it has the trace's schedule.
CHANGES = {
    "official": (),
    "short": (f"train.steps={STEPS}",),
    "unusual": (
        f"train.steps={STEPS}",
        "optim.warmup=300",
        "optim.warmup_ratio=0.1",
        "optim.power=0.9",
        "optim.min_lr=1e-6",
    ),
}


def group_of_each(family: str) -> dict[str, int]:
    """mmcv's group of every official parameter."""
    rows = (TESTS / "golden" / f"{family}_keys.txt").read_text().splitlines()
    digits = TRACES["families"][family]["rows"]
    assert len(rows) == len(digits)
    return {row.split()[1]: int(digit) for row, digit in zip(rows, digits, strict=True) if digit != "-"}


def rates(recipe: Recipe, base: float) -> list[float]:
    """Of a group with this base rate, at each of the steps."""
    return [learning_rate(base, step, recipe.train.steps, recipe.optim) for step in range(STEPS)]


@pytest.mark.parametrize("family", TRACES["families"])
def test_every_parameters_rate_is_mmcvs_at_every_step(family: str) -> None:
    recipe = load_recipe(RECIPES[family])
    with torch.device("meta"):
        model = build_model(recipe.model.name, 150, recipe.model.classifier)
    optim = recipe.optim
    official, theirs = official_keys(model), group_of_each(family)
    wanted = TRACES["families"][family]["groups"]
    compared: set[str] = set()
    for group in param_groups(model, optim):
        (index,) = {theirs[official[name]] for name in group["names"]}  # mmcv does not part what is one group here
        compared |= {official[name] for name in group["names"]}
        assert group["weight_decay"] == wanted[index]["weight_decay"]
        for schedule, words in CHANGES.items():
            changed = load_recipe(RECIPES[family], words)
            given = TRACES["schedules"][schedule]
            told = changed.optim
            assert (told.warmup, told.warmup_ratio, told.power, told.min_lr, changed.train.steps) == tuple(
                given.values()
            )
            found, trace = rates(changed, group["base_lr"]), wanted[index][schedule]
            assert found[::50] == pytest.approx(trace["every_50th"], rel=1e-12)
            if told.power == 1:  # no other power is rounded the same everywhere
                assert hashlib.sha256(struct.pack(f"<{STEPS}d", *found)).hexdigest() == trace["sha256"]
    again = {
        alias for several in aliases(model, compared).values() for alias in several
    }  # the same tensor by other names
    absent = {name for name in theirs if any(fnmatchcase(name, pattern) for pattern in left_out(model))}
    assert theirs.keys() - again - absent == compared
    assert len(wanted) == (1 if family == "afformer_base" else 3)


def test_the_traces_warm_up_and_decay() -> None:
    for family in TRACES["families"].values():
        for group in family["groups"]:
            short = group["short"]["every_50th"]
            assert short[0] == pytest.approx(1e-6 * group["official"]["every_50th"][30] / (1 - 1500 / 160000), rel=1e-9)
            assert max(short) == short[20]  # step 1000: the line goes up, the decay goes down
            assert group["unusual"]["every_50th"][-1] > 1e-6
