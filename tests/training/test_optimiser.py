"""The optimiser: parameter groups, SGD, and learning rates held against a trace that mmcv 1.7.2 itself made.

How `fixtures/mmcv_lr.json` was made, and its keys: `fixtures/make_mmcv_lr.py`.
"""

import hashlib
import json
import struct
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import call
from places import TESTS

from ssaseg.cli.errors import CommandError
from ssaseg.cli.training import optimiser
from ssaseg.cli.training.optimiser import learning_rate, param_groups
from ssaseg.cli.training.step import set_learning_rate, train_step
from ssaseg.models.build import build_outline
from ssaseg.models.official import aliases, left_out, official_keys
from ssaseg.recipes import Recipe, RecipeError, load_recipe

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
    model = build_outline(recipe.model.name, 150, recipe.model.classifier)
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


# ---- SGD, layer-wise decay, vectors ----------------------------------------------------------------------------------


def small_job(make_job: Any, folder: Path, *words: str) -> Any:
    return make_job(folder, "model.drop_path=0", "model.dropout=0", *words)


def test_sgd_is_torchs_with_momentum_decay_and_mmcvs_schedule(tmp_path: Path, make_job: Any) -> None:
    words = ["optim.kind=sgd", "optim.lr=0.01", "optim.momentum=0.9", "optim.weight_decay=5e-4", "optim.power=0.9"]
    job = small_job(make_job, tmp_path, *words, "optim.min_lr=1e-4", "optim.warmup=0", "optim.rules={}")
    reference = [parameter.detach().clone().double() for parameter in job.model.parameters()]
    moved = [torch.zeros_like(each) for each in reference]
    gradients: list[list[torch.Tensor]] = []
    real = job.optimizer.step
    job.optimizer.step = lambda: (
        gradients.append([p.grad.detach().clone().double() for p in job.model.parameters()]),
        real(),
    )
    for number in range(3):
        set_learning_rate(job, number)
        train_step(job, [next(job.batches)])
        job.progress.step += 1
        rate = (0.01 - 1e-4) * (1 - number / 6) ** 0.9 + 1e-4
        for value, velocity, gradient in zip(reference, moved, gradients[-1], strict=True):
            velocity.mul_(0.9).add_(gradient + 5e-4 * value)
            value.sub_(rate * velocity)
    for value, parameter in zip(reference, job.model.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-6)


def test_a_first_step_that_is_held_back_leaves_no_momentum(
    tmp_path: Path, make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("optim.kind=sgd", "optim.lr=0.01", "train.nonfinite=skip")
    undisturbed, job = (small_job(make_job, tmp_path / name, *words) for name in ("one", "two"))
    for each in (undisturbed, job):
        set_learning_rate(each, 0)
    with monkeypatch.context() as patch:
        total = sum(parameter.sum() for parameter in job.model.parameters())
        patch.setattr(job.model, "forward", lambda *_: {"main_ce": total * torch.nan})
        train_step(job, [next(job.batches)])
    assert job.guard.held == 1
    next(undisturbed.batches)
    undisturbed.progress.step = job.progress.step = 1
    for each in (undisturbed, job):
        train_step(each, [next(each.batches)])
    found = job.model.state_dict()
    for key, value in undisturbed.model.state_dict().items():
        assert torch.equal(value, found[key]), key


class Plain:
    """What `param_groups` needs of a network with 24 numbered layers, ViT-Adapter's."""

    name = "vit"

    def __init__(self) -> None:
        self.names: dict[str, tuple[int, ...]] = {
            "backbone.pos_embed": (1, 3),
            "backbone.patch_embed.proj.weight": (3, 3),
            "backbone.blocks.0.norm1.weight": (3,),
            "backbone.blocks.23.mlp.fc1.bias": (3,),
            "backbone.spm.conv.weight": (3, 3),
            "decode_head.conv.weight": (3, 3),
        }

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in self.names.items()]


def test_layer_wise_decay_is_beits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimiser, "official_keys", lambda model: {name: name for name in model.names})
    optim = load_recipe("demo", ["optim.rules={}", "optim.lr=2e-5", "optim.weight_decay=0.05",
                                 "optim.layer_decay=0.95", "optim.decay_vectors=false"]).optim  # fmt: skip
    groups = param_groups(Plain(), optim)  # type: ignore[arg-type]
    found = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert found == {
        "backbone.pos_embed": (pytest.approx(2e-5 * 0.95**25), 0.05),
        "backbone.patch_embed.proj.weight": (pytest.approx(2e-5 * 0.95**25), 0.05),
        "backbone.blocks.0.norm1.weight": (pytest.approx(2e-5 * 0.95**24), 0.0),
        "backbone.blocks.23.mlp.fc1.bias": (pytest.approx(2e-5 * 0.95), 0.0),
        "backbone.spm.conv.weight": (pytest.approx(2e-5), 0.05),
        "decode_head.conv.weight": (pytest.approx(2e-5), 0.05),
    }


def test_layer_wise_decay_needs_numbered_layers() -> None:
    model = build_outline("seaformer_t", 3)
    with pytest.raises(CommandError, match=r"optim\.layer_decay: 0\.9: seaformer_t has no numbered layers"):
        param_groups(model, load_recipe("demo", ["optim.layer_decay=0.9"]).optim)


def test_keys_of_the_other_optimiser_are_refused() -> None:
    for words, key in ((["optim.momentum=0.5"], "momentum"), (["optim.kind=sgd", "optim.betas=[0.8,0.9]"], "betas")):
        with pytest.raises(RecipeError, match=rf"optim\.{key}"):
            load_recipe("demo", words)


def test_the_dry_run_prints_the_groups(tmp_path: Path) -> None:
    result = call("train", "demo", "--dry-run", "--device", "cpu", "--out", tmp_path / "run", "optim.lr=1e-3",
                  "data.synthetic.train=16", "data.synthetic.val=2", "augment.crop=[64,64]", "train.workers=0",
                  "optim.rules={head: {lr: 10}, bn: {decay: 0}}")  # fmt: skip
    lines = [line for line in result.stdout.splitlines() if line.startswith("adamw: ")]
    assert len(lines) == 3
    assert all(" M parameters: lr " in line for line in lines)
    assert any("lr 0.01 (factor 10), weight decay 0.01 (factor 1)" in line for line in lines)
    assert any("lr 0.001 (factor 1), weight decay 0 (factor 0)" in line for line in lines)
