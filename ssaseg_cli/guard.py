"""Losses and gradients that are not finite: no update is made by them, and what reproduces them is kept.

A GPU runs ahead of the program, and to ask after every step whether a number is finite would make it wait each time.
So the verdict on a step stays on the device and suppresses the step's update there; the program reads the verdicts when
it logs. Until then the steps after a bad one that ends the run change nothing: what is found, however late, are the
weights and statistics from before it. Of several GPUs this holds, too, but they are waited for all the same: by
SyncBatchNorm, see `Ranks.wrap`.
"""

import contextlib
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ssaseg.cli.console import CommandError

if TYPE_CHECKING:
    from ssaseg.cli.distributed import Ranks
    from ssaseg.cli.job import Job

# Below it fp16's loss scale no longer helps: gradients of the loss itself overflow.
LOW_SCALE = 1.0
# 40 halvings from 65536: not even an all but vanished loss has a gradient that fp16 can hold.
NO_SCALE = 2.0**-24


class StepRecord(NamedTuple):
    """A step as the log needs it; tensors on the device, unread."""

    number: int  # counted from 1
    images: list[str]
    losses: Tensor  # (T,), one a term
    norm: Tensor  # () norm of the gradient, before clipping
    bad: Tensor  # () 1 where something was not finite, else 0
    pairs: Tensor | None  # what `Classifier.training_step` was told of the whole step


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
        # What is not stored is constant. The others change in place only, so that these views stay true; by type, as
        # one tensor has one type.
        stored = model.state_dict().keys()
        views = [buffer.view(-1) for name, buffer in model.named_buffers() if name in stored]
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


def low_scale(job: "Job") -> float | None:
    """fp16's loss scale where it has fallen so low that something is wrong, else None. Waits for the device.

    Raises FloatingPointError, with the state saved, where no scale is left: then no step has been made for long.
    """
    scale = job.scaler.get_scale()
    if job.scaler.is_enabled() and scale < NO_SCALE:
        kept = save_before_error(job, "the state")
        raise FloatingPointError(
            f"step {job.progress.step}: in fp16 the gradient is not finite at any loss scale (now {scale:g}); {kept}\n"
            + advice(job, skippable=False)
        )
    return scale if job.scaler.is_enabled() and scale < LOW_SCALE else None


def advice(job: "Job", skippable: bool = True) -> str:
    """What to do after a number that is not finite: going on with the same recipe would end the same way.

    skippable: leaving out updates would help.
    """
    weights, limit = job.folder / "last.safetensors", job.guard.limit
    start, skip = "", ""
    if weights.exists():
        # Not these: they are finite, and may have diverged all the same. Before a first evaluation little is lost.
        best = job.folder / "best.safetensors"
        start = f"model.pretrained={best}, " if best.exists() else ""
        more = f"train.max_skipped above {limit} leaves more" if limit else "train.nonfinite=skip leaves"
        skip = f"--resume with {more} such updates out; else " if skippable else ""
    return f"{skip}start a new run with {start}a lower optim.lr, optim.grad_clip=1 or train.amp=off"


def stop_before(job: "Job", step: StepRecord, names: list[str]) -> FloatingPointError:
    """Ends a run at a bad step: saves the state from before it, writes what reproduces it, returns the error.

    Every rank calls it; `names` of the losses. Waits for the device.
    """
    job.progress.step = step.number - 1
    own = torch.cat([step.losses, step.norm.view(1)]).float()
    table = own.new_zeros(job.ranks.size, len(own))
    table[job.ranks.rank] = own
    rows = job.ranks.total(table).tolist()
    # The gradient is the same everywhere: a loss tells which rank it came from.
    rank = next((rank for rank, row in enumerate(rows) if not all(map(isfinite, row[:-1]))), 0)
    losses, norm = dict(zip(names, rows[rank][:-1], strict=True)), rows[rank][-1]
    what = broken_terms(losses, norm)
    path = job.folder / f"nonfinite-step-{step.number}.pt"
    kept = save_before_error(job, "the state before it")
    content = reproducer(job, rank, step.pairs, losses, norm)
    if job.ranks.main:
        with contextlib.suppress(OSError):  # a full disk: the message matters more
            torch.save(content, path)
    allowed = f" (after {job.guard.limit} that train.nonfinite=skip left out)" if job.guard.limit else ""
    kept, written = job.ranks.share((kept, path.exists()))  # whichever rank tells it
    where = f"; batch and weights: {path.name}" if written else ""
    return FloatingPointError(
        f"step {step.number}{allowed}: {what}; {kept}\nimages: {', '.join(content['names'])}{where}\n" + advice(job)
    )


def broken_terms(losses: dict[str, float], norm: float) -> str:
    """What is not finite of a bad step, in a few words: at most three losses by name; the reproducer has all."""
    wrong = {name: value for name, value in losses.items() if not isfinite(value)}
    if not wrong:
        return "a norm's statistic is not finite" if isfinite(norm) else f"the gradient is not finite (norm {norm:g})"
    told = [f"{name} {value:g}" for name, value in wrong.items()][:3]
    what = "every loss" if len(wrong) > 1 and len(wrong) == len(losses) else f"loss {', '.join(list(wrong)[:3])}"
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f"{what}{more if what != 'every loss' else ''} is not finite ({', '.join(told)}{more})"


def save_before_error(job: "Job", what: str) -> str:
    """Saves, and says whether that went well, as a part of the error that follows: it matters more than this one."""
    from ssaseg.cli.saving import save

    try:
        save(job)
    except (FloatingPointError, CommandError, OSError) as error:
        return f"{what} could not be saved: " + str(error).partition("\n")[0]
    return f"{what} is saved"


def reproducer(job: "Job", rank: int, pairs: Tensor | None, losses: dict[str, float], norm: float) -> dict[str, Any]:
    """What `replay` takes: step, seed, recipe, classes, weights before the step, and `rank`'s images as the network saw
    them: float32 (N,3,H,W) normalised RGB, labels uint8 (N,H,W); `pairs` and the figures that came out.

    The batch is loaded again, as it is decided by seed and position alone.
    """
    from ssaseg.cli.job import open_loader
    from ssaseg.cli.train import step_seed

    recipe = job.recipe
    loader = open_loader(job, job.progress.step, workers=0, rank=rank)
    batches = [next(loader) for _ in range(job.micro_batches)]
    parts = [job.prepare(batch) for batch in batches]
    return {
        "step": job.progress.step + 1,
        "seed": step_seed(recipe.train.seed, job.progress.step, rank),
        "recipe": recipe.model_dump(mode="json"),
        "classes": list(job.train_set.classes),
        "names": [name for batch in batches for name in batch.names],
        "images": torch.cat([images for images, _ in parts]).cpu(),
        "labels": torch.cat([labels for _, labels in parts]).byte().cpu(),
        "micro_batch": job.micro_batch,
        "pairs": None if pairs is None else pairs.cpu(),
        "losses": losses,
        "grad_norm": norm,
        "weights": {key: value.cpu() for key, value in job.model.state_dict().items()},
    }


def replay(path: Path | str, device: str = "cpu") -> tuple[dict[str, float], float]:
    """Takes the step in a `nonfinite-step-N.pt` again, with a fresh network: its losses by name, and the norm of its
    gradient before clipping. Raises FileNotFoundError where there is no such file.

    On the kind of device that the file came from, as dropout draws other numbers on another. Without fp16's loss scale:
    a gradient that vanishes or overflows there alone may differ.

    >>> losses, norm = replay("runs/demo/nonfinite-step-7.pt")
    """
    from ssaseg.cli.freezing import freeze, set_mode
    from ssaseg.cli.job import build_network
    from ssaseg.cli.train import autocast, gradient_norm
    from ssaseg.recipes import parse_recipe

    content = torch.load(path, map_location=device, weights_only=True)
    recipe = parse_recipe(content["recipe"], str(path))
    model = build_network(recipe, content["classes"])
    model.load_state_dict(content["weights"])
    model.to(device)
    freeze(model, recipe.optim.freeze)
    set_mode(model, recipe.optim.freeze)
    torch.manual_seed(content["seed"])
    parts = list(zip(*(content[key].split(content["micro_batch"]) for key in ("images", "labels")), strict=True))
    totals: dict[str, float] = {}
    for images, labels in parts:
        with autocast(torch.device(device), recipe.train.amp):
            losses = model(images, labels.long(), content["pairs"])
        (torch.stack(list(losses.values())).sum() / len(parts)).backward()
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0.0) + loss.item() / len(parts)
    return totals, gradient_norm(model).item()
