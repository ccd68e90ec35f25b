"""An exponential moving average of a network's weights: often better than the weights of any one step."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ssaseg.models.layers import norm_statistics


class Average:
    """Averages of a network's parameters, and of the norms' statistics with them.

    Not of a classifier's own state, such as a memory bank: that is an average already, or no number to average.

    average += (1 - d) * (value - average) after each step, d = min(decay, (1 + step) / (10 + step)), so that random
    first weights are soon forgotten. Source: TensorFlow's `tf.train.ExponentialMovingAverage` with `num_updates`.
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
        """Takes in the weights after step number `step` (from 1); nothing where `held` () on the device is 1."""
        share = (1 - min(self.decay, (1 + step) / (10 + step))) * (1 - held)
        difference = torch._foreach_sub(self.live, self.values)
        torch._foreach_mul_(difference, share)
        torch._foreach_add_(self.values, difference)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averages for weights, and the averages are the weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        kept = [value.clone() for value in self.live]
        torch._foreach_copy_(self.live, self.values)
        torch._foreach_copy_(self.values, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name."""
        return dict(zip(self.names, self.values, strict=True))

    def load_state_dict(self, stored: Mapping[str, Tensor]) -> None:
        """Goes on from stored averages. Raises KeyError where one is missing."""
        for name, value in zip(self.names, self.values, strict=True):
            value.copy_(stored[name])
