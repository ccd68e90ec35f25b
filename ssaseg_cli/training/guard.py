"""Losses and gradients that are not finite: no update is made by them, and what reproduces them is kept.

A GPU runs ahead of the program, and to ask after every step whether a number is finite would make it wait each time.
So the verdict on a step stays on the device and suppresses the step's update there; the program reads the verdicts when
it logs. Until then the steps after a bad one that ends the run change nothing: what is found, however late, are the
weights and statistics from before it. Of several GPUs this holds, too, but they are waited for all the same: by
SyncBatchNorm, see `Ranks.wrap`.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssaseg.models.layers import norm_statistics

if TYPE_CHECKING:
    from ssaseg.cli.ranks.ranks import Ranks


class Guard:
    """Judges steps and holds back the updates of bad ones, without a word from the device to the host.

    Bad is a loss, a norm's statistic or (but in fp16, where the scaler tries a smaller scale) a gradient that is not
    finite. The update of a bad step is left out; after more than `limit` bad ones that of every step.
    """

    def __init__(
        self, model: torch.nn.Module, scaler: torch.amp.GradScaler, ranks: "Ranks", limit: int, skipped: int = 0
    ) -> None:
        """limit: bad steps that the run may go on after; skipped: those that it went on after before a resume."""
        self.scaler, self.ranks, self.limit = scaler, ranks, limit
        self.count = torch.full((), float(min(skipped, limit)), device=ranks.device)
        self.held = torch.zeros((), device=ranks.device)
        # What a forward pass changes; in place only, so that these views stay true. By type, as one tensor has one.
        # A classifier's own state changes in its `update`, which knows of held steps.
        views = [buffer.view(-1) for buffer in norm_statistics(model).values()]
        types = {view.dtype for view in views}
        self.buffers = [[view for view in views if view.dtype == each] for each in sorted(types, key=str)]
        self.before: list[Tensor] = []  # of the step that is being made
        self.updated = False  # whether that step's update was begun
        scaler.scale(self.held)  # it makes its tensors when it is first used
        tensors = (scaler._scale, scaler._growth_tracker) if scaler.is_enabled() else ()
        self.scale = [each for each in tensors if each is not None]

    def start(self) -> None:
        """Before a step: keeps what its forward pass will change."""
        self.updated = False
        self.before = [torch.cat(views) for views in self.buffers] + [each.clone() for each in self.scale]

    def judge(self, losses: Tensor, norm: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        """The verdict on a step with `losses` (T,) and gradient norm (), both unread: 1 bad, 0 good, on the device.

        Before the optimiser's step, which heeds what is set here: a fused optimiser leaves everything as it is where
        `found_inf` is 1, its counts of steps too.
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
        """After a step: puts back what a held one changed beside the weights: statistics, and fp16's loss scale."""
        self._put_back(self.held > 0)
        self.before = []

    def undo(self) -> None:
        """After a step that was broken off before its update: puts back what it had changed."""
        if self.before:  # else it was broken off as it began
            self._put_back(torch.ones_like(self.held, dtype=torch.bool))

    def _put_back(self, where: Tensor) -> None:
        before = iter(self.before)
        for views in self.buffers:
            chosen = torch.where(where, next(before), torch.cat(views))
            torch._foreach_copy_(views, list(chosen.split([len(view) for view in views])))
        for live, kept in zip(self.scale, before, strict=True):
            live.copy_(torch.where(where, kept, live))
