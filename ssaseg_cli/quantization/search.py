"""The search for layers that must stay in float32: ranks them by what their int8 alone costs, then leaves out most.

The cost of a layer is the mean squared error of the logits on training images, relative to their variance, if only this
layer is quantised. Errors of layers are nearly independent, so their sum is that of the whole network.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from ssaseg.cli.printing import echo

T = TypeVar("T")

RANKING = 0.6  # share of the time that the ranking may take; the rest is for verdicts


class Cost(NamedTuple):
    """A layer, or some neighbours that are quantised together, and the relative error of their int8 alone."""

    layers: tuple[str, ...]
    error: float


def rank_layers(layers: Sequence[str], error: Callable[[Sequence[str]], float], seconds: float) -> list[Cost]:
    """Costs of all layers, most costly first. `error`: the error of a network of which only the given layers are int8.

    If one measurement per layer takes longer than `seconds`, neighbours are measured together.
    """
    started = printed = time.perf_counter()
    costs = [Cost((layers[0],), error(layers[:1]))]
    affordable = max(seconds / max(time.perf_counter() - started, 1e-6) - 1, 1)
    step = int(np.ceil((len(layers) - 1) / affordable)) if len(layers) > 1 else 1
    for first in range(1, len(layers), step):
        together = tuple(layers[first : first + step])
        costs.append(Cost(together, error(together)))
        if time.perf_counter() - printed >= 10:
            printed = time.perf_counter()
            echo(f"  measured {min(first + step, len(layers))} of {len(layers)} layers", err=True)
    # An error that is not a number is the worst.
    return sorted(costs, key=lambda cost: -np.nan_to_num(cost.error, nan=np.inf))


def fewest(costs: Sequence[Cost], attempt: Callable[[list[str]], T | None], deadline: float) -> T | None:
    """What `attempt` returns for the fewest of the most costly layers with which it is not None.

    The number of costs left out is doubled until an attempt succeeds, or more than half of them are left out; then it
    is halved between the last that failed and the first that succeeded. No attempt starts after `deadline`
    [s of time.perf_counter], but one is always made.
    """

    def leaving(count: int) -> T | None:
        return attempt([layer for cost in costs[:count] for layer in cost.layers])

    failed, count, best = 0, 1, None
    while count <= max(len(costs) // 2, 1):
        best = leaving(count)
        if best is not None:
            break
        failed, count = count, 2 * count
        if time.perf_counter() > deadline:
            return None
    else:
        return None
    while count - failed > 1 and time.perf_counter() < deadline:
        middle = (failed + count) // 2
        found = leaving(middle)
        if found is None:
            failed = middle
        else:
            best, count = found, middle
    return best
