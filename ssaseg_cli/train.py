"""`ssaseg train`: one visible loop."""

import contextlib
import sys
import time
from math import isnan
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from ssaseg.cli import report
from ssaseg.cli.console import CommandError, select_device
from ssaseg.cli.job import Job, build_job, describe, metadata, open_folder, write_start
from ssaseg.cli.schedule import learning_rate
from ssaseg.cli.state import save_state
from ssaseg.cli.watch import Window, mend
from ssaseg.datasets import DataError
from ssaseg.datasets.colour import prepare_batch
from ssaseg.datasets.loader import WorkerError
from ssaseg.models import save_model
from ssaseg.recipes import Recipe

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run_train(recipe: Recipe, out: Path, resume: bool, device: str, dry_run: bool, check: str = "sample") -> int:
    """Trains `recipe` in the folder `out`. Returns the exit code: 0, or 130 / 143 after a signal, state saved.

    Raises CommandError for what the user can mend, FloatingPointError where a loss or a weight is not finite.
    """
    chosen = select_device(device)
    if recipe.train.amp == "fp16" and chosen.type == "cpu":
        raise CommandError("train.amp: fp16 needs a GPU\nexpected off or bf16 on a CPU; use train.amp=bf16")
    if dry_run and resume:
        raise CommandError("--dry-run writes nothing and goes on with nothing\nleave out --resume")
    stored = None if dry_run else open_folder(out, recipe, resume)
    job = build_job(recipe, out, chosen, stored, check)
    if dry_run:
        return rehearse(job)
    describe(job)
    write_start(job)
    with job.stop, contextlib.closing(Window(job)) as window:
        return train(job, window)


def train(job: Job, window: Window) -> int:
    """The loop. Returns the exit code."""
    recipe, progress = job.recipe, job.progress
    while True:
        # What a resumed run finds already done is not done again.
        fresh = progress.evaluated < progress.step
        if fresh and due(progress.step, recipe.train.eval_every, recipe.train.steps):
            with window.aside():
                finished = evaluate(job)
            if not finished:
                return job.stop.exit_code
        if progress.step == recipe.train.steps:
            tqdm.write(f"done: best mIoU {progress.best_miou:.2f} %, run folder {job.folder}", file=sys.stderr)
            return 0

        rate = set_learning_rate(job, progress.step)
        batches = read_batches(job, window)
        losses = train_step(job, batches)
        progress.step += 1
        window.add(progress.step, batches, losses)

        log, save_now, evaluate_next = (
            due(progress.step, every, recipe.train.steps)
            for every in (recipe.train.log_every, recipe.train.save_every, recipe.train.eval_every)
        )
        stop = job.stop.requested
        # Reading a loss makes a GPU wait, so that is left to the log and to what builds on it; a CPU need not wait.
        if log or save_now or evaluate_next or stop or job.device.type == "cpu":
            window.check()
        if log:
            window.write(rate)
        if save_now or evaluate_next or stop:
            with window.aside():
                save(job)
        if stop:
            tqdm.write(f"stopped after step {progress.step}; state saved, go on with --resume", file=sys.stderr)
            return job.stop.exit_code


def read_batches(job: Job, window: Window) -> list[Any]:
    """The next step's micro-batches. Where they cannot be had, what was learnt is saved before the error goes on."""
    window.start_waiting()
    try:
        return [next(job.batches) for _ in range(job.micro_batches)]
    except (DataError, WorkerError, OSError):
        if job.progress.step > 0:
            window.check()
            save(job)
            text = f"stopped after step {job.progress.step}; state saved, go on with --resume once this is mended:"
            tqdm.write(text, file=sys.stderr)
        raise
    finally:
        window.stop_waiting()


def train_step(job: Job, batches: list[Any]) -> dict[str, Tensor]:
    """One optimiser step over its micro-batches. Returns the losses, averaged over them, on the device.

    Every random number of step i comes from (seed, i): a resumed run draws what the undisturbed one would have drawn.
    """
    recipe, model, optimizer, scaler = job.recipe, job.model, job.optimizer, job.scaler
    torch.manual_seed(step_seed(recipe.train.seed, job.progress.step))
    model.train()
    # The dice is divided by a number of the whole step, which its first micro-batch must know already.
    pairs = None
    if len(batches) > 1:
        labels = (batch.labels.to(job.device, non_blocking=True) for batch in batches)
        pairs = torch.stack([model.classifier.step_pairs(label) for label in labels]).mean()
    totals: dict[str, Tensor] = {}
    for batch in batches:
        images, label = prepare_batch(batch, recipe.data.mean, recipe.data.std, job.device)
        with autocast(job.device, recipe.train.amp):
            losses = model(images, label, pairs)
        scaler.scale(torch.stack(list(losses.values())).sum() / len(batches)).backward()
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0) + loss.detach() / len(batches)
    if recipe.optim.grad_clip:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    model.update()
    return totals


def due(step: int, every: int, steps: int) -> bool:
    """Whether something done `every` steps, and after the last, is due after `step`; never at step 0."""
    return step > 0 and (step % every == 0 or step == steps)


def step_seed(seed: int, step: int) -> int:
    """A seed for each step of each run: a 64-bit mix, so that neighbours share nothing."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step + 1) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ (mixed >> 27)) & 0x7FFFFFFFFFFFFFFF


def set_learning_rate(job: Job, step: int) -> float:
    """Sets every group's rate for `step`; returns the base rate's value, for the log."""
    optim, steps = job.recipe.optim, job.recipe.train.steps
    for group in job.optimizer.param_groups:
        group["lr"] = learning_rate(group["base_lr"], step, steps, optim)
    return learning_rate(optim.lr, step, steps, optim)


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision of a recipe's `train.amp` on `device`."""
    return torch.autocast(device.type, dtype=AMP_TYPES.get(amp, torch.bfloat16), enabled=amp != "off")


# ---- evaluating and saving ---------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Leaves an evaluation when the run is asked to stop."""


def evaluate(job: Job) -> bool:
    """Evaluates in float32, logs, keeps the best weights, draws pictures. False where a signal broke it off.

    The weights were saved, and so found finite, before; the state that says "evaluated" comes last.
    """
    from ssaseg.cli.evaluate import evaluate_model, state_protocol

    recipe, progress = job.recipe, job.progress

    def stop_if_asked(*_: Any) -> None:
        if job.stop.requested:
            raise Interrupted

    started = time.perf_counter()
    # Validation images come in many sizes; each would be tuned for.
    tuned, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        confusion = evaluate_model(
            job.model,
            job.val_set,
            recipe.test.model_dump(),
            recipe.data.mean,
            recipe.data.std,
            job.device,
            workers=min(recipe.train.workers, 1),
            progress=stop_if_asked,
        )
    except Interrupted:
        tqdm.write(f"stopped while evaluating step {progress.step}; state saved, go on with --resume", file=sys.stderr)
        return False
    finally:
        torch.backends.cudnn.benchmark = tuned
    scores = confusion.scores()
    # JSON has no NaN; it stands here for "nothing was labelled".
    figures = {key: None if isnan(scores[key]) else scores[key] for key in ("mIoU", "aAcc", "mAcc")}  # type: ignore[literal-required]
    statement = state_protocol(recipe.test, "val", len(job.val_set), len(job.val_set))
    progress.evaluated, progress.scores = progress.step, {**figures, "statement": statement}
    assert job.log is not None
    seconds = time.perf_counter() - started
    job.log.write({"step": progress.step, **figures, "eval_seconds": round(seconds, 2)})
    text = f"step {progress.step}: mIoU {scores['mIoU']:.2f} %, aAcc {scores['aAcc']:.2f} % ({seconds:.0f} s)"
    tqdm.write(text, file=sys.stderr)
    miou = figures["mIoU"] or 0.0
    if miou > progress.best_miou:
        progress.best_miou = miou
        save_model(job.folder / "best.safetensors", job.model, metadata(job))
    report.draw_curves(job.folder / "metrics.jsonl", job.folder / "curves.png")
    write_predictions(job)
    save(job)
    return True


def save(job: Job) -> None:
    """Writes the training state, then its weights; never weights that are not finite over good ones."""
    values = [value for value in job.model.state_dict().values() if value.is_floating_point()]
    if not torch.stack([value.isfinite().all() for value in values]).all():
        raise FloatingPointError(
            f"step {job.progress.step}: a weight or a norm's statistic is not finite; nothing was overwritten\n"
            + mend(job.folder)
        )
    recipe = job.recipe.model_dump(mode="json")
    save_state(job.folder, job.progress, job.model, job.optimizer, job.scaler, recipe)
    save_model(job.folder / "last.safetensors", job.model, metadata(job))


def write_predictions(job: Job, images: int = 4) -> None:
    """`predictions.png`: for the same validation images each time: image, label, coarse and final prediction."""
    from ssaseg.cli.inference import predict_labels

    job.model.eval()
    rows = []
    palette = job.val_set.palette
    step = max(len(job.val_set) // images, 1)
    for index in range(0, min(len(job.val_set), step * images), step):
        image, labels = job.val_set.load(index)
        result = predict_labels(
            job.model, image, job.recipe.test.model_dump(), job.recipe.data.mean, job.recipe.data.std, job.device
        )
        maps = [labels, result.labels] if result.coarse is None else [labels, result.coarse, result.labels]
        rows.append([image, *(report.overlay(image, each, palette) for each in maps)])
    report.write_grid(job.folder / "predictions.png", rows)


def rehearse(job: Job) -> int:
    """`--dry-run`: one step of everything, then memory and time to expect. Writes nothing."""
    describe(job)
    window = Window(job, bar=False)
    started = time.perf_counter()
    set_learning_rate(job, 0)
    batches = [next(job.batches) for _ in range(job.micro_batches)]
    losses = train_step(job, batches)
    window.add(1, batches, losses)
    window.check()
    seconds = time.perf_counter() - started
    if job.device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB of GPU memory"
    else:
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is bytes there, KiB elsewhere
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.0f} MiB of resident memory"
    total = int(seconds * job.recipe.train.steps)
    clock = f"{total // 3600} h {total % 3600 // 60} min {total % 60} s"
    click.echo(f"dry run: one step took {seconds:.2f} s (the first is slow) and {memory} at its peak")
    click.echo(f"all {job.recipe.train.steps} steps: at most {clock} without evaluation; nothing was written")
    return 0
