"""Learning rates and parameter groups by mmsegmentation 0.x's rules, which the published numbers were trained with."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssaseg.models import Segmenter
from ssaseg.models.keys import official_keys


def learning_rate(base: float, step: int, steps: int, optim: Any) -> float:
    """The rate of a group with base rate `base` at `step` (counted from 0) of `steps`; `optim`: the recipe's section.

    (base − min_lr) · (1 − step/steps)^power + min_lr; in the first `warmup` steps that decaying value is multiplied by
    a line from `warmup_ratio` to 1. Source: mmcv 1.7, `PolyLrUpdaterHook`; mmseg 1.x begins to decay at `warmup`.
    """
    rate = (base - optim.min_lr) * (1 - step / steps) ** optim.power + optim.min_lr
    if step < optim.warmup:
        rate *= 1 - (1 - step / optim.warmup) * (1 - optim.warmup_ratio)
    return rate


def param_groups(model: nn.Module, lr: float, weight_decay: float, rules: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups of parameters of one rate and one decay, for AdamW; `base_lr` is what the schedule starts from.

    A rule's key is looked for in a parameter's *official* name, so `head` means everything behind the backbone and
    `norm` the official spelling; keys are tried in alphabetical order, longer ones first, and the first that is found
    counts. A rule has `lr` and `decay`, multipliers. What is frozen is in no group. Source: mmcv 1.7,
    `DefaultOptimizerConstructor`.
    """
    keys = sorted(sorted(rules), key=len, reverse=True)
    official = official_keys(model)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rule = next((rules[key] for key in keys if key in official[name]), None)
        multipliers = (rule.lr, rule.decay) if rule else (1.0, 1.0)
        rate = lr * multipliers[0]
        new = {"params": [], "names": [], "lr": rate, "base_lr": rate, "weight_decay": weight_decay * multipliers[1]}
        group = groups.setdefault(multipliers, new)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def frozen(model: Segmenter, what: Collection[str]) -> Iterator[nn.Module]:
    """The modules that `what` names: "backbone", and "norm" for every BatchNorm."""
    if "backbone" in what:
        yield model.backbone
    if "norm" in what:
        yield from (module for module in model.modules() if isinstance(module, _BatchNorm))


def freeze(model: Segmenter, what: Collection[str]) -> None:
    """Takes the gradient from what is not trained; the optimiser and `set_mode` then leave it as it is."""
    for module in frozen(model, what):
        module.requires_grad_(False)


def set_mode(model: Segmenter, what: Collection[str] = ()) -> None:
    """Training mode, but for what is frozen: its statistics stay, and nothing of it is dropped at random."""
    model.train()
    for module in frozen(model, what):
        module.eval()
