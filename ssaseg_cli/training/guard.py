"""Losses and gradients that are not finite: they update nothing, and the weights from before them are kept.

The program queues work for a GPU and runs ahead of it. To read after every step whether a number is finite would make
it wait each time. So the verdict on a step stays on the device and suppresses the step's update there. The program
reads the verdicts when it logs. If a bad step ends the run, the steps between it and the next log line change nothing:
the program then still finds the weights and statistics from before the bad step. This also holds for several GPUs; but
there SyncBatchNorm waits anyway, see `Ranks.wrap`.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssaseg.models.layers import norm_statistics

if TYPE_CHECKING:
    from ssaseg.cli.ranks.ranks import Ranks


class Guard:
    """Judges steps and suppresses the updates of bad ones. Nothing is copied from the device to the host.

    A step is bad if a loss, a norm's statistic or a gradient is not finite. In fp16 a gradient does not count: there
    the scaler tries a smaller scale. The update of a bad step is skipped; after more than `limit` bad steps, the update
    of every step.
    """

    def __init__(
        self, model: torch.nn.Module, scaler: torch.amp.GradScaler, ranks: "Ranks", limit: int, skipped: int = 0
    ) -> None:
        """limit: how many bad steps the run may skip; skipped: how many it has skipped before it was resumed."""
        self.scaler, self.ranks, self.limit = scaler, ranks, limit
        self.count = torch.full((), float(min(skipped, limit)), device=ranks.device)
        self.held = torch.zeros((), device=ranks.device)
        # What a forward pass changes: only in place, so that these views stay valid. One group for each data type, so
        # that a group can be one tensor. A classifier's own state changes in its `update`, which gets `held`.
        views = [buffer.view(-1) for buffer in norm_statistics(model).values()]
        types = {view.dtype for view in views}
        self.buffers = [[view for view in views if view.dtype == each] for each in sorted(types, key=str)]
        self.before: list[Tensor] = []  # values from before the current step
        self.updated = False  # whether the update of the current step has started
        scaler.scale(self.held)  # the scaler makes its tensors when it is first used
        tensors = (scaler._scale, scaler._growth_tracker) if scaler.is_enabled() else ()
        self.scale = [each for each in tensors if each is not None]

    def start(self) -> None:
        """Before a step: copies what its forward pass will change."""
        self.updated = False
        self.before = [torch.cat(views) for views in self.buffers] + [each.clone() for each in self.scale]

    def judge(self, losses: Tensor, norm: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        """The verdict on a step with `losses` (T,) and gradient norm (): 1 bad, 0 good. All stay on the device.

        Called before the optimiser's step, which uses what is set here: if `found_inf` is 1, a fused optimiser leaves
        everything unchanged, its counts of steps too.
        """
        finite = losses.isfinite().all()
        for views in self.buffers:
            if views[0].is_floating_point():
                finite = finite & torch.cat(views).isfinite().all()
        if not self.scaler.is_enabled():
            finite = finite & norm.isfinite()
        bad = self.ranks.total((~finite).float()).clamp_(max=1)
        self.count += bad
        self.held = torch.maximum(bad, (self.count > self.limit).float())
        if self.scaler.is_enabled():
            for found in self.scaler._found_inf_per_device(optimizer).values():
                found.copy_(torch.maximum(found, self.held))
        else:
            optimizer.found_inf = self.held  # type: ignore[attr-defined]
        return bad

    def finish(self) -> None:
        """After a step: if it was suppressed, restores what else it has changed: statistics, and fp16's loss scale."""
        self._restore(self.held > 0)
        self.before = []

    def undo(self) -> None:
        """After a step that ended early, before its update: restores what it has changed."""
        if self.before:  # empty if the step ended before `start`
            self._restore(torch.ones_like(self.held, dtype=torch.bool))

    def _restore(self, where: Tensor) -> None:
        before = iter(self.before)
        for views in self.buffers:
            chosen = torch.where(where, next(before), torch.cat(views))
            torch._foreach_copy_(views, list(chosen.split([len(view) for view in views])))
        for live, kept in zip(self.scale, before, strict=True):
            live.copy_(torch.where(where, kept, live))
