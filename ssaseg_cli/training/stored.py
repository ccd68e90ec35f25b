"""What a training state must hold: names, types and ranges of all its values, shapes and types of all its tensors.

A state may come from somewhere else, from a later version, or from a damaged disk. Fused optimisers write into their
tensors without looking at the shapes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ssaseg.cli.training.job import Progress
from ssaseg.recipes import Recipe, parse_recipe

ENTRIES = {"progress", "model", "optimizer", "scaler", "recipe"}  # besides these, a state may have `extra`

# The optimiser's tensors of one parameter, by `optim.kind`.
MOMENTS = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}

SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}

LARGEST_COUNT = 2**53  # of whole numbers without a smaller limit


def require_state(state: Any, step: int) -> None:
    """Raises ValueError for what is not a whole training state after `step`, and RecipeError for its recipe.

    Tensors are held against those of the model in the same state; `require_fit` holds them against the run.
    """
    known = _mapping(state, "the state")
    missing = ENTRIES - known.keys()
    if missing:
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    _only(known, ENTRIES | {"extra"}, "the state")
    recipe = parse_recipe(_mapping(known["recipe"], "recipe"), "its recipe")
    model = _tensors(known["model"], "model")
    for name, value in model.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite")
    _progress(known["progress"], step, recipe.train.steps or 0)
    _optimizer(known["optimizer"], model, recipe.optim.kind)
    updated = known["progress"]["step"] > known["progress"].get("skipped", 0) and recipe.train.amp != "fp16"
    if updated and not known["optimizer"]["state"] and (recipe.optim.kind == "adamw" or recipe.optim.momentum):
        raise ValueError("optimizer.state is empty: its moments are missing")
    _scaler(known["scaler"], recipe.train.amp == "fp16")
    _extra(_mapping(known.get("extra", {}), "extra"), model, recipe)


def require_fit(
    stored: Mapping[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer, average: Sequence[str]
) -> None:
    """Raises ValueError if a state, checked by `require_state`, does not belong to this model and optimiser, or if its
    averages do not have the names `average`. Shapes of the model's own tensors are for `load_strict` to check.
    """
    tensors = stored["model"]
    for name, value in model.state_dict().items():
        if name in tensors and tensors[name].dtype != value.dtype:
            raise ValueError(f"{name} is {tensors[name].dtype}, expected {value.dtype}")
    own, groups = optimizer.param_groups, stored["optimizer"]["param_groups"]
    if len(own) != len(groups):
        raise ValueError(f"{len(groups)} groups of parameters, expected {len(own)}")
    for group, mine in zip(groups, own, strict=True):
        if group["names"] != mine["names"]:
            pairs = zip(group["names"], mine["names"], strict=False)
            first = next((f"{a!r:.60} in the place of {b}" for a, b in pairs if a != b), "another number of them")
            raise ValueError(f"its parameters are not those of this version: {first}")
        # The schedule sets `lr` before each step. All others follow from the recipe, or are PyTorch's defaults.
        for key in group.keys() & mine.keys() - {"params", "names", "lr"}:
            if type(group[key]) is not type(mine[key]) or group[key] != mine[key]:
                raise ValueError(f"its optimiser has {key} {group[key]!r:.60}, expected {mine[key]!r:.60}")
    if list(stored.get("extra", {}).get("ema", {})) != list(average):
        raise ValueError("its averages do not belong to this network")


def _progress(found: Any, step: int, steps: int) -> None:
    progress = _mapping(found, "progress")
    _only(progress, {each.name for each in fields(Progress)}, "progress")
    if missing := {"step", "evaluated", "best_miou"} - progress.keys():
        raise ValueError(f"progress has no {', '.join(sorted(missing))}")
    _whole(progress["step"], "progress.step", 0, steps)
    if progress["step"] != step:
        raise ValueError(f"progress.step is {progress['step']}, expected {step} as in the file's name")
    _whole(progress["evaluated"], "progress.evaluated", 0, step)
    _number(progress["best_miou"], "progress.best_miou", -1, 100)
    _whole(progress.get("stale", 0), "progress.stale", 0, step)
    _whole(progress.get("skipped", 0), "progress.skipped", 0, step)
    scores = _mapping(progress.get("scores", {}), "progress.scores")
    for key, value in scores.items():
        if value is not None and not isinstance(value, str):
            _number(value, f"progress.scores.{key}", 0, 100)


def _optimizer(found: Any, model: Mapping[str, Tensor], kind: str) -> None:
    optimizer = _mapping(found, "optimizer")
    if optimizer.keys() != {"state", "param_groups"}:
        raise ValueError("optimizer: expected the keys state and param_groups")
    if not isinstance(optimizer["param_groups"], list) or not optimizer["param_groups"]:
        raise ValueError("optimizer.param_groups: expected a list of groups")
    names: list[str] = []  # of the parameters, by the number that the optimiser gives them
    for number, each in enumerate(optimizer["param_groups"]):
        where = f"optimizer.param_groups[{number}]"
        group = _mapping(each, where)
        own = group.get("names")
        if not isinstance(own, list) or not all(isinstance(name, str) and name in model for name in own):
            raise ValueError(f"{where}.names: expected names of the model's parameters")
        if group.get("params") != list(range(len(names), len(names) + len(own))):
            raise ValueError(f"{where}.params: expected the numbers of its {len(own)} parameters")
        names += own
        for key, value in group.items():
            if key not in ("names", "params"):
                _hyperparameter(value, f"{where}.{key}")
    if len(set(names)) < len(names):
        raise ValueError("optimizer.param_groups: a parameter is in two groups")
    _moments(optimizer["state"], [(name, model[name]) for name in names], MOMENTS[kind])


def _hyperparameter(value: Any, where: str) -> None:
    for number in value if isinstance(value, tuple | list) and len(value) == 2 else [value]:
        if number is not None and not isinstance(number, bool):
            _number(number, where, 0, LARGEST_COUNT)


def _moments(found: Any, parameters: Sequence[tuple[str, Tensor]], expected: set[str]) -> None:
    """The optimiser's tensors, each against its parameter; parameters that never had a gradient have none."""
    used: set[int] = set()
    for number, each in _mapping(found, "optimizer.state").items():
        if type(number) is not int or not 0 <= number < len(parameters):
            raise ValueError(f"optimizer.state: {number!r:.60} is not the number of a parameter")
        name, parameter = parameters[number]
        where = f"optimizer.state of {name}"
        moments = _mapping(each, where)
        if moments.keys() != expected:
            raise ValueError(f"{where}: expected {', '.join(sorted(expected))}")
        for key, value in moments.items():
            if value is None and key == "momentum_buffer":  # sgd without momentum
                continue
            if not isinstance(value, Tensor):
                raise ValueError(f"{where}: {key} is not a tensor")
            shape, dtype = (torch.Size(), torch.float32) if key == "step" else (parameter.shape, parameter.dtype)
            _fits(value, shape, dtype, f"{where}: {key}")
            if value.numel() and value.data_ptr() in used:
                raise ValueError(f"{where}: {key} has the memory of another tensor")
            used.add(value.data_ptr())
        if "step" in moments:
            _whole_float(float(moments["step"]), f"{where}: step")


def _whole_float(value: float, where: str) -> None:
    if not (value >= 0 and value == value // 1 and value < LARGEST_COUNT):
        raise ValueError(f"{where} is {value:g}, expected a whole number")


def _scaler(found: Any, enabled: bool) -> None:
    scaler = _mapping(found, "scaler")
    if scaler.keys() != (SCALER if enabled else set()):
        raise ValueError(
            "scaler: expected the loss scale of fp16" if enabled else "scaler: expected nothing, as in amp"
        )
    if not enabled:
        return
    _number(scaler["scale"], "scaler.scale", 2.0**-149, 2.0**127)
    _number(scaler["growth_factor"], "scaler.growth_factor", 1, 2.0**16)
    _number(scaler["backoff_factor"], "scaler.backoff_factor", 2.0**-16, 1)
    _whole(scaler["growth_interval"], "scaler.growth_interval", 1, LARGEST_COUNT)
    _whole(scaler["_growth_tracker"], "scaler._growth_tracker", 0, scaler["growth_interval"])


def _extra(extra: Mapping[str, Any], model: Mapping[str, Tensor], recipe: Recipe) -> None:
    _only(extra, {"data", "ema"}, "extra")
    if ("ema" in extra) != (recipe.optim.ema is not None):
        raise ValueError("extra.ema: expected the averaged weights if optim.ema is set, and only then")
    for name, value in _tensors(extra["ema"], "extra.ema").items() if "ema" in extra else ():
        if name not in model:
            raise ValueError(f"extra.ema: {name!r:.60} is not in the model")
        _fits(value, model[name].shape, model[name].dtype, f"extra.ema: {name}")
    for split, each in _mapping(extra.get("data") or {}, "extra.data").items():
        if split not in ("train", "val"):
            raise ValueError(f"extra.data: {split!r:.60} is not a split")
        found = _mapping(each, f"extra.data.{split}")
        if found.keys() != {"images", "classes", "names", "content"}:
            raise ValueError(f"extra.data.{split}: expected images, classes, names, content")
        _whole(found["images"], f"extra.data.{split}.images", 1, LARGEST_COUNT)
        texts = found["classes"] if isinstance(found["classes"], list) else [None]
        if not all(isinstance(text, str) for text in (*texts, found["names"], found["content"])):
            raise ValueError(f"extra.data.{split}: expected a list of class names, and two sums as text")


# ---- single values -------------------------------------------------------------------------------------------------
def _mapping(value: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {type(value).__name__}, expected a mapping")
    return value


def _only(mapping: Mapping[Any, Any], known: set[str], where: str) -> None:
    if unknown := [key for key in mapping if key not in known]:
        raise ValueError(f"{where}: unknown key {unknown[0]!r:.60}: was it written by a later version?")


def _whole(value: Any, where: str, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{where} is {value!r:.60}, expected a whole number from {least} to {most}")


def _number(value: Any, where: str, least: float, most: float) -> None:
    if type(value) not in (int, float) or not isfinite(value) or not least <= value <= most:
        raise ValueError(f"{where} is {value!r:.60}, expected a number from {least:g} to {most:g}")


def _tensors(value: Any, where: str) -> Mapping[str, Tensor]:
    found = _mapping(value, where)
    if not found or not all(isinstance(key, str) and isinstance(each, Tensor) for key, each in found.items()):
        raise ValueError(f"{where}: expected tensors by name")
    return found


def _fits(value: Tensor, shape: torch.Size, dtype: torch.dtype, where: str) -> None:
    """Raises ValueError unless the tensor has this shape and type. `read_archive` has made it dense and on the CPU."""
    if value.shape != shape or value.dtype != dtype:
        raise ValueError(f"{where} is {value.dtype} {tuple(value.shape)}, expected {dtype} {tuple(shape)}")
