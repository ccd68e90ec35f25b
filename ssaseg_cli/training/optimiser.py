"""The optimiser, its schedule and parameter groups by the rules of mmsegmentation 0.x, and what is frozen."""

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

    (base − min_lr) · (1 − step/steps)^power + min_lr. In the first `warmup` steps this decaying value is multiplied by
    a factor that rises linearly from `warmup_ratio` to 1. Source: mmcv 1.7, `PolyLrUpdaterHook`; in mmseg 1.x the decay
    starts only at step `warmup`.
    """
    rate = (base - optim.min_lr) * (1 - step / steps) ** optim.power + optim.min_lr
    if step < optim.warmup:
        rate *= 1 - (1 - step / optim.warmup) * (1 - optim.warmup_ratio)
    return rate


def make_optimiser(model: Segmenter, optim: Any) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum, over `param_groups`. Fused: the guard suppresses an update inside its kernel."""
    groups = param_groups(model, optim)
    if optim.kind == "adamw":
        return torch.optim.AdamW(groups, betas=optim.betas, fused=True)
    optimizer = torch.optim.SGD(groups, momentum=optim.momentum, fused=True)
    for group in groups if optim.momentum else ():
        for parameter in group["params"]:
            # PyTorch makes its own buffer in the first step. If that step is suppressed, the buffer's values stay
            # undefined.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def param_groups(model: Segmenter, optim: Any) -> list[dict[str, Any]]:
    """Groups of parameters with the same rate and decay. `base_lr`: the rate that the schedule starts from; `lr_factor`
    and `decay_factor`: factors of the recipe's rate and decay. `optim`: the recipe's section. Frozen parameters are in
    no group.

    `rules`: a key is searched in a parameter's *official* name. So `head` means everything behind the backbone, and
    `norm` is the official spelling. Longer keys are tried first, keys of the same length in alphabetical order; the
    first key that is found applies. A rule has the factors `lr` and `decay`. Source: mmcv 1.7,
    `DefaultOptimizerConstructor`. `decay_vectors` and `layer_decay` apply in addition. Raises CommandError for
    `layer_decay` if the network has no numbered layers.
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
    """Factor of the learning rate of each parameter under layer-wise decay; {} if `decay` is None.

    The patch and position embeddings are layer 0, block i is layer i + 1, and everything else is one layer behind the
    last block. A layer's factor is decay^(number of layers behind it). Source: BEiT's `LayerDecayOptimizerConstructor`,
    as in ViT-Adapter's `mmcv_custom`.
    """
    if decay is None:
        return {}
    block = re.compile(r"backbone\.blocks\.(\d+)\.")
    blocks = {name: int(found[1]) for name, key in official.items() if (found := block.match(key))}
    if not blocks:
        raise CommandError(
            f"optim.layer_decay: {decay:g}: {model.name} has no numbered layers (backbone.blocks.N)\n"
            "expected a plain transformer\nuse optim.layer_decay=null; in optim.rules, modules can have their own rates"
        )
    last = max(blocks.values()) + 2
    first = tuple(f"backbone.{name}" for name in ("patch_embed", "pos_embed", "cls_token", "mask_token"))
    layers = {name: 0 if key.startswith(first) else last for name, key in official.items()}
    layers |= {name: number + 1 for name, number in blocks.items()}
    return {name: decay ** (last - layer) for name, layer in layers.items()}


def describe_groups(optimizer: torch.optim.Optimizer) -> list[str]:
    """A line for each group: its numbers of tensors and parameters, its rate and decay, and their factors."""
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
    """Turns off gradients for what is frozen; the optimiser then leaves it out."""
    for module in frozen(model, what):
        module.requires_grad_(False)


def set_mode(model: Segmenter, what: Collection[str] = ()) -> None:
    """Sets training mode, except for what is frozen: there statistics do not change, and dropout is off."""
    model.train()
    for module in frozen(model, what):
        module.eval()
