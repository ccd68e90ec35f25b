"""The optimiser: its schedule and parameter groups by mmsegmentation 0.x's rules, and what is not trained."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssaseg.cli.errors import CommandError
from ssaseg.models import Segmenter
from ssaseg.models.official import official_keys


def learning_rate(base: float, step: int, steps: int, optim: Any) -> float:
    """The rate of a group with base rate `base` at `step` (counted from 0) of `steps`; `optim`: the recipe's section.

    (base − min_lr) · (1 − step/steps)^power + min_lr; in the first `warmup` steps that decaying value is multiplied by
    a line from `warmup_ratio` to 1. Source: mmcv 1.7, `PolyLrUpdaterHook`; mmseg 1.x begins to decay at `warmup`.
    """
    rate = (base - optim.min_lr) * (1 - step / steps) ** optim.power + optim.min_lr
    if step < optim.warmup:
        rate *= 1 - (1 - step / optim.warmup) * (1 - optim.warmup_ratio)
    return rate


def make_optimiser(model: Segmenter, optim: Any) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum, over `param_groups`. Fused: the guard holds an update back inside its kernel."""
    groups = param_groups(model, optim)
    if optim.kind == "adamw":
        return torch.optim.AdamW(groups, betas=optim.betas, fused=True)
    optimizer = torch.optim.SGD(groups, momentum=optim.momentum, fused=True)
    for group in groups if optim.momentum else ():
        for parameter in group["params"]:
            # A first step that is held back would leave PyTorch's own buffer as memory that nobody has written.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def param_groups(model: Segmenter, optim: Any) -> list[dict[str, Any]]:
    """Groups of parameters of one rate and one decay. `base_lr` is what the schedule starts from; `lr_factor` and
    `decay_factor` are its share of the recipe's numbers. `optim`: the recipe's section. What is frozen is in no group.

    `rules`: a key is looked for in a parameter's *official* name, so `head` means everything behind the backbone and
    `norm` the official spelling; keys are tried in alphabetical order, longer ones first, and the first that is found
    counts. A rule has `lr` and `decay`, factors. Source: mmcv 1.7, `DefaultOptimizerConstructor`. `decay_vectors` and
    `layer_decay` come on top. Raises CommandError for `layer_decay` of a network without numbered layers.
    """
    keys = sorted(sorted(optim.rules), key=len, reverse=True)
    official = official_keys(model)
    layers = layer_factors(model, official, optim.layer_decay)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rule = next((optim.rules[key] for key in keys if key in official[name]), None)
        lr, decay = (rule.lr, rule.decay) if rule else (1.0, 1.0)
        lr *= layers.get(name, 1.0)
        if not optim.decay_vectors and (parameter.dim() == 1 or name.endswith(".bias")):
            decay = 0.0
        rate = optim.lr * lr
        factors = {"lr_factor": lr, "decay_factor": decay}
        new = {"params": [], "names": [], "lr": rate, "base_lr": rate, "weight_decay": optim.weight_decay * decay}
        group = groups.setdefault((lr, decay), {**new, **factors})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def layer_factors(model: Segmenter, official: Mapping[str, str], decay: float | None) -> dict[str, float]:
    """Factor of the learning rate of each parameter under layer-wise decay; {} where `decay` is None.

    Layers count from 0, the patch and position embeddings; block i is layer i + 1, all else the one behind the last
    block. A layer's factor is decay^(layers behind it). Source: BEiT's `LayerDecayOptimizerConstructor`, as ViT-Adapter
    has it in `mmcv_custom`.
    """
    if decay is None:
        return {}
    block = re.compile(r"backbone\.blocks\.(\d+)\.")
    blocks = {name: int(found[1]) for name, key in official.items() if (found := block.match(key))}
    if not blocks:
        raise CommandError(
            f"optim.layer_decay: {decay:g}: {model.name} has no numbered layers (backbone.blocks.N)\n"
            "expected a plain transformer\nuse optim.layer_decay=null; optim.rules gives parts rates of their own"
        )
    last = max(blocks.values()) + 2
    first = tuple(f"backbone.{part}" for part in ("patch_embed", "pos_embed", "cls_token", "mask_token"))
    layers = {name: 0 if key.startswith(first) else last for name, key in official.items()}
    layers |= {name: number + 1 for name, number in blocks.items()}
    return {name: decay ** (last - layer) for name, layer in layers.items()}


def describe_groups(optimizer: torch.optim.Optimizer) -> list[str]:
    """A line for each group: how many tensors and parameters, and the factors of rate and decay."""
    return [
        f"{len(group['params'])} tensors, {sum(each.numel() for each in group['params']) / 1e6:.2f} M parameters: "
        f"lr {group['base_lr']:.3g} (factor {group['lr_factor']:g}), "
        f"weight decay {group['weight_decay']:.3g} (factor {group['decay_factor']:g})"
        for group in optimizer.param_groups
    ]


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
