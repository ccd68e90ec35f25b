"""What happens if a loss or gradient is not finite: the run stops, and the step can be computed again."""

import contextlib
import io
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssaseg.cli.errors import CommandError
from ssaseg.cli.training.faults import advice
from ssaseg.cli.training.job import StepRecord
from ssaseg.datasets import DataError
from ssaseg.files.writing import write_atomic

if TYPE_CHECKING:
    from ssaseg.cli.training.job import Job


# Below this value fp16's loss scale no longer helps: gradients of the loss itself overflow.
LOW_SCALE = 1.0

# 65536 after 40 halvings: even the gradient of a loss that is almost 0 does not fit into fp16.
NO_SCALE = 2.0**-24


def low_scale(job: "Job") -> float | None:
    """fp16's loss scale if it is so low that something is wrong, otherwise None. Waits for the device.

    Saves the state and raises FloatingPointError below `NO_SCALE`: then no step has changed a weight for a long time.
    """
    scale = job.scaler.get_scale()
    if job.scaler.is_enabled() and scale < NO_SCALE:
        saved = try_to_save(job, "the state")
        raise FloatingPointError(
            f"step {job.progress.step}: in fp16 the gradient is not finite at any loss scale (now {scale:g}); {saved}\n"
            + advice(job, skippable=False)
        )
    return scale if job.scaler.is_enabled() and scale < LOW_SCALE else None


def stop_before(job: "Job", step: StepRecord, names: list[str]) -> FloatingPointError:
    """Ends a run at a bad step: saves the state from before this step, writes a file that reproduces the step, and
    returns the error.

    Every rank calls it. `names`: names of the losses. Waits for the device.
    """
    job.progress.step = step.number - 1
    own = torch.cat([step.losses, step.norm.view(1)]).float()
    table = own.new_zeros(job.ranks.size, len(own))
    table[job.ranks.rank] = own
    rows = job.ranks.total(table).tolist()
    # The gradient is the same on every rank. A loss shows which rank the fault came from.
    rank = next((rank for rank, row in enumerate(rows) if not all(map(isfinite, row[:-1]))), 0)
    losses, norm = dict(zip(names, rows[rank][:-1], strict=True)), rows[rank][-1]
    what = broken_terms(losses, norm)
    path = job.folder / f"nonfinite-step-{step.number}.pt"
    saved = try_to_save(job, "the state from before this step")
    images = write_reproducer(job, path, rank, step.totals, losses, norm) or step.images
    limit = job.guard.limit
    skipped = f" (after {limit} step{'s' * (limit > 1)} skipped by train.nonfinite=skip)" if limit else ""
    saved, written = job.ranks.broadcast((saved, path.exists()))  # any rank may be the one that prints the error
    where = f"; batch and weights: {path.name}" if written else ""
    return FloatingPointError(
        f"step {step.number}{skipped}: {what}; {saved}\nimages: {', '.join(images)}{where}\n" + advice(job)
    )


def write_reproducer(
    job: "Job", path: Path, rank: int, totals: Tensor | None, losses: dict[str, float], norm: float
) -> list[str]:
    """Writes `reproducer` to `path` on rank 0, if this is possible. Returns the names of the step's images; empty if
    they cannot be loaded again.

    The disk may be full, or the memory used up, and PyTorch has a RuntimeError for both: the error of the step matters
    more.
    """
    names: list[str] = []
    with contextlib.suppress(OSError, RuntimeError, MemoryError, DataError):
        content = reproducer(job, rank, totals, losses, norm)
        names = content["names"]
        if job.ranks.main:
            job.require_folder()
            buffer = io.BytesIO()
            torch.save(content, buffer)
            write_atomic(path, buffer.getvalue(), root=job.folder)
    return names


def broken_terms(losses: dict[str, float], norm: float) -> str:
    """What is not finite in a bad step, in a few words. Names at most three losses; the reproducer has all of them."""
    wrong = {name: value for name, value in losses.items() if not isfinite(value)}
    if not wrong:
        return "a norm's statistic is not finite" if isfinite(norm) else f"the gradient is not finite (norm {norm:g})"
    shown = [f"{name} {value:g}" for name, value in wrong.items()][:3]
    what = "every loss" if len(wrong) > 1 and len(wrong) == len(losses) else f"loss {', '.join(list(wrong)[:3])}"
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f"{what}{more if what != 'every loss' else ''} is not finite ({', '.join(shown)}{more})"


def try_to_save(job: "Job", what: str) -> str:
    """Saves the state, called `what`. Returns whether that worked, as text for the error that the caller raises."""
    from ssaseg.cli.training.saving import save

    try:
        save(job)
    except (FloatingPointError, CommandError, OSError, MemoryError) as error:
        return f"{what} could not be saved: " + str(error).partition("\n")[0]
    return f"{what} was saved"


def reproducer(job: "Job", rank: int, totals: Tensor | None, losses: dict[str, float], norm: float) -> dict[str, Any]:
    """What `replay` needs: step, seed, recipe, classes, the weights from before the step, `totals`, the resulting
    losses and norm, and `rank`'s images as the network saw them: float32 (N,3,H,W) normalised RGB, labels uint8
    (N,H,W).

    The batch is loaded again: it depends only on the seed and the position in the data.
    """
    from ssaseg.cli.training.build import open_loader
    from ssaseg.cli.training.step import step_seed

    recipe = job.recipe
    loader = open_loader(job, job.progress.step, workers=0, rank=rank)
    batches = [next(loader) for _ in range(job.micro_batches)]
    prepared = [job.prepare(batch) for batch in batches]
    return {
        "step": job.progress.step + 1,
        "seed": step_seed(recipe.train.seed, job.progress.step, rank),
        "recipe": recipe.model_dump(mode="json"),
        "classes": list(job.train_set.classes),
        "names": [name for batch in batches for name in batch.names],
        "images": torch.cat([images for images, _ in prepared]).cpu(),
        "labels": torch.cat([labels for _, labels in prepared]).byte().cpu(),
        "micro_batch": job.micro_batch,
        "totals": None if totals is None else totals.cpu(),
        "losses": losses,
        "grad_norm": norm,
        "weights": {key: value.cpu() for key, value in job.model.state_dict().items()},
    }


def replay(path: Path | str, device: str = "cpu") -> tuple[dict[str, float], float]:
    """Computes the step in a `nonfinite-step-N.pt` again, with a new network. Returns its losses by name, and the norm
    of its gradient before clipping. Raises FileNotFoundError if there is no such file.

    Use the kind of device that the file came from: dropout draws other numbers on another kind. fp16's loss scale is
    not used: a gradient that is 0 or overflows only with it may differ.

    >>> losses, norm = replay("runs/demo/nonfinite-step-7.pt")
    """
    from ssaseg.cli.training.build import build_network
    from ssaseg.cli.training.optimiser import freeze, set_mode
    from ssaseg.cli.training.step import autocast, gradient_norm
    from ssaseg.cli.weights.archive import read_archive
    from ssaseg.recipes import parse_recipe

    content = read_archive(Path(path))
    recipe = parse_recipe(content["recipe"], str(path))
    model = build_network(recipe, content["classes"])
    model.load_state_dict(content["weights"])
    model.to(device)
    freeze(model, recipe.optim.freeze)
    set_mode(model, recipe.optim.freeze)
    torch.manual_seed(content["seed"])
    batches = list(zip(*(content[key].split(content["micro_batch"]) for key in ("images", "labels")), strict=True))
    given = content["totals"]
    totals: dict[str, float] = {}
    for images, labels in ((images.to(device), labels.to(device)) for images, labels in batches):
        with autocast(torch.device(device), recipe.train.amp):
            losses = model(images, labels.long(), None if given is None else given.to(device))
        (torch.stack(list(losses.values())).sum() / len(batches)).backward()
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0.0) + loss.item() / len(batches)
    return totals, gradient_norm(model).item()
