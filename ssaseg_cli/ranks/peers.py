"""The other ranks as a classifier's `update` sees them: two sums of tensors, and nothing of processes and hosts."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ssaseg.cli.ranks.ranks import Ranks


@dataclass(frozen=True)
class RankPeers:
    """`ssaseg.models.classifiers.base.Peers` of a process among several; alone, every method is free."""

    ranks: Ranks

    def total(self, tensor: Tensor) -> Tensor:
        """Sum of the ranks' tensors, on the device; no GPU waits."""
        return self.ranks.total(tensor)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, all of one shape, in the order of ranks, on the device; no GPU waits."""
        if self.ranks.size == 1:
            return [tensor]
        found = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.ranks.size)]
        dist.all_gather(found, tensor.contiguous())
        return found
