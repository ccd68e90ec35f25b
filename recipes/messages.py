"""Errors of a recipe in at most three lines: the place, the key, what was expected, what was got, and the fix."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ssaseg.recipes.reading import Keys, brief, short
from ssaseg.recipes.schema import Recipe

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text (in quotes if it looks like a number)",
    "string_too_short": "text that is not empty",
    "string_too_long": "text of at most {max_length} characters",
    "string_unicode": "text that can be written as UTF-8",
    "control": "text of one line, without control characters",
    "string_pattern_mismatch": "text without slashes that does not start with a dot",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping of `key: value`",
    "model_type": "a section of `key: value` lines",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "{le:g} or less",
    "literal_error": "{expected}",
    "too_long": "a list of {max_length}",
    "too_short": "a list of at least {min_length}",
}

# What other programs call our keys, where the names are not alike.
_ELSEWHERE = {
    **dict.fromkeys(("backbone", "network", "arch", "architecture", "encoder"), "model.name"),
    **dict.fromkeys(("learning_rate", "base_lr", "lr0"), "optim.lr"),
    **dict.fromkeys(("optimizer", "optimiser"), "optim.kind"),
    **dict.fromkeys(("iterations", "iters", "max_iters", "max_steps"), "train.steps"),
    **dict.fromkeys(("batch_size", "bs", "samples_per_gpu"), "train.batch"),
    **dict.fromkeys(("num_workers", "workers_per_gpu"), "train.workers"),
    **dict.fromkeys(("crop_size", "image_size", "img_size", "imgsz"), "augment.crop"),
    **dict.fromkeys(("data_root", "data_dir", "data_path", "dataset_root"), "data.root"),
    **dict.fromkeys(("checkpoint", "load_from", "weights_path"), "model.pretrained"),
    **dict.fromkeys(("precision", "fp16", "bf16", "mixed_precision"), "train.amp"),
}


def explain(error: ValidationError, source: str, places: Mapping[Keys, str]) -> str:
    """The first problem of a recipe, and the number of the other problems.

    Args:
        error: what the schema found.
        source: the recipe's name or file, for keys that were not written.
        places: where each key was written ("file:line"), by its path.
    """
    # A key with a typing error is unknown, and the right key is missing: the unknown key is the cause and comes first.
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    loc, what, fix = _describe(problems[0])
    lines = [f"{place_of(loc, places, source)}: {what}", fix]
    if len(problems) > 1:
        lines.append(f"({len(problems) - 1} more problem{'s' if len(problems) > 2 else ''})")
    return "\n".join(line for line in lines if line)


def place_of(keys: Keys, places: Mapping[Keys, str], source: str) -> str:
    """Where a key, or the nearest section around it, was written ("file:line"); `source` if it was not written."""
    return next((places[keys[:end]] for end in range(len(keys), 0, -1) if keys[:end] in places), source)


def _describe(problem: Mapping[str, Any]) -> tuple[Keys, str, str]:
    """The key, what is wrong with it, and the fix (or the meaning of the key)."""
    kind, got, context = problem["type"], problem["input"], problem.get("ctx", {})
    loc = tuple(part for part in problem["loc"] if part != "[key]")  # pydantic's mark for "the key, not the value"
    if kind == "across_keys":
        loc, fix = tuple(context["key"].split(".")), context["fix"]
        return loc, f"{dotted(loc)}: expected {context['expected']}, got {short(context['got'])}", fix
    if kind == "extra_forbidden":
        return loc, f"unknown key {dotted(loc)}", _did_you_mean(loc)
    if kind == "missing" and isinstance(loc[-1], str):
        return loc, f"{dotted(loc)} is missing", _description(loc)
    if kind == "missing":  # the second number of a pair
        return loc[:-1], f"{dotted(loc[:-1])}: expected a longer list, got {short(got)}", _description(loc)
    expected = _EXPECTED.get(kind, problem["msg"]).format(**context)
    return loc, f"{dotted(loc)}: expected {expected}, got {short(got)}", _description(loc)


def _did_you_mean(loc: Keys) -> str:
    *above, name = map(str, loc)
    section = _section(tuple(above))
    if near := likely_keys(name, dotted(tuple(above))):
        return f"did you mean {' or '.join(near)}?"
    return f"known keys {'of ' + dotted(tuple(above)) if above else 'at the top'}: {', '.join(section.model_fields)}"


def likely_keys(name: str, section: str = "") -> list[str]:
    """The known keys of all sections that a name is likely to mean, at most two: those of the most similar name, and of
    several similar names those of `section`, where it was looked for.
    """
    name = name.lower()[:60]  # all keys are in lower case, and short
    if name in _ELSEWHERE:
        return [_ELSEWHERE[name]]
    scores: dict[str, float] = {}
    inside = [f"{section}.{field}" for field in _section(tuple(section.split("."))).model_fields]
    for key in (*_all_keys(Recipe), *inside):  # those inside may be below a name that the user has chosen
        above, _, last = key.rpartition(".")
        alike = difflib.SequenceMatcher(None, name, last).ratio()
        if alike >= 0.6:
            scores[key] = alike + 0.15 * (above == section)
    return [key for key, score in scores.items() if score >= max(scores.values()) - 1e-9][:2]


def _all_keys(section: type[BaseModel], above: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield above + name
        below = _section_of(field.annotation)
        if below is not None and get_origin(field.annotation) is not dict:  # in a dict, the user chooses the names
            yield from _all_keys(below, f"{above}{name}.")


def _section(loc: Keys) -> type[BaseModel]:
    """The section with the keys below `loc`. Skips names that the user has chosen, such as `head` in `rules.head`."""
    section: type[BaseModel] = Recipe
    for part in loc:
        field = section.model_fields.get(part)
        section = (_section_of(field.annotation) if field else None) or section
    return section


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section inside an annotation: `Data`, `Folders | None`, `dict[str, Rule]`."""
    # In Python 3.10 `tuple[int, int]` counts as a class.
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        return annotation
    return next((found for found in map(_section_of, get_args(annotation)) if found), None)


def _description(loc: Keys) -> str:
    for end in range(len(loc), 0, -1):
        field = _section(loc[: end - 1]).model_fields.get(loc[end - 1])
        if field is not None:
            return f"{dotted(loc[:end])}: {field.description}"
    return ""


def dotted(loc: Keys) -> str:
    """`("augment", "crop", 1)` as augment.crop[1]."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{brief(part)}" for part in loc).lstrip(".")
