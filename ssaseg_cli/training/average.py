"""An exponential moving average of a network's weights: it often scores better than the weights of any one step."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ssaseg.models.layers import norm_statistics


class Average:
    """Averages of a network's parameters and of its norms' statistics.

    A classifier's own state, such as a memory bank, is left out: it is an average already, or cannot be averaged.

    After each step: average += (1 - d) * (value - average), with d = min(decay, (1 + step) / (10 + step)). So the
    random first weights soon lose their influence. Source: TensorFlow's `tf.train.ExponentialMovingAverage` with
    `num_updates`.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        averaged = {name for name, _ in model.named_parameters()} | norm_statistics(model).keys()
        live = {
            key: value for key, value in model.state_dict().items() if key in averaged and value.is_floating_point()
        }
        self.names, self.live = list(live), list(live.values())  # the model's own memory, not copies
        self.values = [value.clone() for value in self.live]

    def update(self, step: int, held: Tensor) -> None:
        """Adds the weights after step number `step` (from 1). Changes nothing if `held` () on the device is 1."""
        share = (1 - min(self.decay, (1 + step) / (10 + step))) * (1 - held)
        difference = torch._foreach_sub(self.live, self.values)
        torch._foreach_mul_(difference, share)
        torch._foreach_add_(self.values, difference)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside this context the model has the averages as its weights, and `values` holds the weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        weights = [value.clone() for value in self.live]
        torch._foreach_copy_(self.live, self.values)
        torch._foreach_copy_(self.values, weights)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name."""
        return dict(zip(self.names, self.values, strict=True))

    def load_state_dict(self, stored: Mapping[str, Tensor]) -> None:
        """Continues from stored averages. Raises KeyError if one is missing."""
        for name, value in zip(self.names, self.values, strict=True):
            value.copy_(stored[name])
