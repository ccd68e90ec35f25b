"""Checks of the keys that depend on the classifier: names of losses and options, and sizes of micro-batches.

Recipes do not import networks, so the caller passes the facts (`ssaseg.models.facts`): losses by name, options by name,
and whether images form groups.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from ssaseg.recipes.messages import dotted, place_of
from ssaseg.recipes.reading import Keys, RecipeError, short
from ssaseg.recipes.schema import Recipe

# Facts about a network with its classifier. `losses`: by name, each with its default `weight`. `options`: by name, each
# with `meaning` and `expected(value)`: what it expects instead of a value, "" if it is valid. `uses_groups`: whether
# images form groups of `distill.group`, which a micro-batch must not split. `compat`: what `model.compat` does; empty:
# nothing.
Facts = Any
Known = Callable[[str, str], Facts]  # (network, classifier) → facts; raises ValueError for an unknown name


def check_classifier(recipe: Recipe, known: Known | None, source: str, places: Mapping[Keys, str]) -> None:
    """Checks names and values of losses and options, and that micro-batches divide the batch evenly.

    known: finds the facts; None: only the checks that need no facts. source and places: as `explain`. Raises
    RecipeError.
    """

    def wrong(keys: Keys, got: object, expected: str, fix: str) -> RecipeError:
        what = f"{dotted(keys)}: expected {expected}, got {short(got)}"
        return RecipeError(f"{place_of(keys, places, source)}: {what}\n{fix}")

    facts = None
    # Called only if a key depends on the facts: it may import PyTorch, which takes time.
    model, micro = recipe.model, recipe.train.micro_batch
    if known is not None and (recipe.loss.weights or model.options or model.compat or isinstance(micro, int)):
        try:
            facts = known(recipe.model.name, recipe.model.classifier)
        except ValueError as error:
            raise RecipeError(f"recipe {recipe.name}, model: {error}") from None
        _check_names(recipe, facts, wrong)
        if model.compat and not facts.compat:
            expected = f"false, as {model.name} already trains as the official code"
            raise wrong(("model", "compat"), True, expected, "remove the key")
    _check_micro_batch(recipe, facts is not None and facts.uses_groups, wrong)


def _check_names(recipe: Recipe, facts: Facts, wrong: Callable[..., RecipeError]) -> None:
    classifier = f"{recipe.model.name} with {recipe.model.classifier}"
    for keys, given, names in (
        (("loss", "weights"), recipe.loss.weights, facts.losses),
        (("model", "options"), recipe.model.options, facts.options),
    ):
        unknown = next((name for name in given if name not in names), None)
        if unknown is not None:
            near = difflib.get_close_matches(unknown, list(names), n=1)
            fix = f"did you mean {dotted((*keys, near[0]))}?" if near else "remove the key"
            known_names = f"one of {', '.join(names)}" if names else f"no key in {dotted(keys)}"
            raise wrong((*keys, unknown), given[unknown], f"{known_names} for {classifier}", fix)
    if not any(recipe.loss.weights.get(name, loss.weight) for name, loss in facts.losses.items()):
        raise wrong(("loss", "weights", next(iter(facts.losses))), 0, "a loss with a weight above 0", "set it to 1")
    for name, value in recipe.model.options.items():
        option = facts.options[name]
        if expected := option.expected(value):
            raise wrong(("model", "options", name), value, expected, f"{name}: {option.meaning}")


def _check_micro_batch(recipe: Recipe, grouped: bool, wrong: Callable[..., RecipeError]) -> None:
    """With split groups, the loss would depend on the size of the micro-batch."""
    batch, micro, group = recipe.train.batch, recipe.train.micro_batch, recipe.distill.group
    if not isinstance(micro, int) or micro == batch:
        return
    step = group if grouped else 1
    fits = [str(size) for size in range(step, batch, step) if batch % size == 0]
    fix = f"possible with this batch{' and group' * grouped}: {', '.join([*fits, 'null'])}"
    if not fits:
        fix = "use train.micro_batch=null" + (f", or distill.group={micro}" if batch % micro == 0 else "")
    if batch % micro:
        raise wrong(("train", "micro_batch"), micro, f"a divisor of train.batch, {batch}", fix)
    if grouped and micro % group:
        raise wrong(("train", "micro_batch"), micro, f"a multiple of distill.group, {group}", fix)
