"""`ssaseg train`: one visible loop."""

import contextlib
import sys
import time
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from ssaseg.cli.device import select_device
from ssaseg.cli.errors import CommandError
from ssaseg.cli.ranks import ranks as distributed
from ssaseg.cli.signals import Interrupted
from ssaseg.cli.training import faults
from ssaseg.cli.training.build import build_job
from ssaseg.cli.training.folder import open_run, write_start
from ssaseg.cli.training.job import Job, StepRecord
from ssaseg.cli.training.log import MetricsLog
from ssaseg.cli.training.nonfinite import stop_before
from ssaseg.cli.training.optimiser import describe_groups
from ssaseg.cli.training.pictures import after_evaluation, write_batch
from ssaseg.cli.training.preflight import describe, deterministic
from ssaseg.cli.training.saving import complete, save, save_best
from ssaseg.cli.training.step import set_learning_rate, train_step
from ssaseg.cli.training.trackers import Tracker, open_trackers
from ssaseg.cli.training.window import Window
from ssaseg.datasets import DataError
from ssaseg.datasets.loader import WorkerError
from ssaseg.recipes import Recipe

# Where reading a verdict makes nobody wait, it is read after every step.
READY = {"cpu"}


def run_train(
    recipe: Recipe,
    out: Path,
    resume: bool,
    device: str,
    dry_run: bool,
    check: str = "sample",
    max_hours: float | None = None,
    track: Sequence[str] = (),
) -> int:
    """Trains `recipe` in the folder `out`. Returns the exit code: 0 done, or, with the state saved, 1 after `max_hours`
    and 130 / 143 after a signal. Under torchrun it is 0 after `max_hours`: for any other it would begin them anew.

    Raises CommandError for what the user can mend, FloatingPointError where a loss or a weight is not finite.
    """
    deadline = None if max_hours is None else time.monotonic() + max_hours * 3600
    chosen = select_device(device)
    if recipe.train.amp == "fp16" and chosen.type == "cpu":
        raise CommandError("train.amp: fp16 needs a GPU\nexpected off or bf16 on a CPU; use train.amp=bf16")
    if dry_run and resume:
        raise CommandError("--dry-run writes nothing and goes on with nothing\nleave out --resume")
    with contextlib.ExitStack() as stack:
        stack.enter_context(deterministic(recipe.train.deterministic))
        ranks = stack.enter_context(distributed.connect(chosen))
        trackers: list[Tracker] = []
        stored = None
        restarted = ranks.any(distributed.was_restarted())
        if ranks.main and not dry_run:
            trackers = open_trackers(track, out, recipe)
            run = stack.enter_context(open_run(out, recipe, resume, restarted, ranks.size))
            recipe, stored = run.recipe, run.stored
        recipe, stored = ranks.broadcast((recipe, stored))
        job = build_job(recipe, out, ranks, stored, check)
        if ranks.main:
            describe(job)
        if dry_run:
            return rehearse(job)
        job.deadline = deadline
        if ranks.main:
            write_start(job)
            if stored is not None:
                complete(job)
            open_log(job, trackers)
            stack.callback(close_all, trackers)
        with job.stop, contextlib.closing(Window(job)) as window:
            try:
                return train(job, window)
            finally:
                if job.stop.requested:
                    job.stop.ignore_signals()


def open_log(job: Job, trackers: Sequence[Tracker]) -> None:
    """`metrics.jsonl`, and a picture of the first batch."""
    job.log = MetricsLog(job.folder / "metrics.jsonl", job.progress.step, job.progress.evaluated, trackers)
    if not (job.folder / "batch.png").exists():
        write_batch(job)


def close_all(trackers: Sequence[Tracker]) -> None:
    """Lets trackers hand over what they still hold."""
    for tracker in trackers:
        tracker.close()


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
        if progress.step == recipe.train.steps or out_of_patience(job):
            say(job, f"done: best mIoU {progress.best_miou:.2f} %, run folder {job.folder}")
            return 0

        rate = set_learning_rate(job, progress.step)
        batches = read_batches(job, window)
        record, names = take_step(job, window, batches)
        progress.step += 1
        window.add(record, names)

        log, save_now, evaluate_next = (
            due(progress.step, every, recipe.train.steps)
            for every in (recipe.train.log_every, recipe.train.save_every, recipe.train.eval_every)
        )
        stop = job.ranks.agree(job.stop)
        late = job.deadline is not None and job.ranks.any(time.monotonic() > job.deadline)
        # Reading a verdict makes a GPU wait, so that is left to the log and to what builds on it; a CPU need not wait.
        if log or save_now or evaluate_next or stop or late or job.device.type in READY:
            bad = window.check()
            if bad is not None:
                raise stop_before(job, bad, names)
        if log:
            window.write(rate)
        if save_now or evaluate_next or stop or late:
            with window.aside():
                save(job)
        if stop or (late and progress.step < recipe.train.steps):
            job.stop.saved = True
            why = "" if stop else " as --max-hours is over"
            say(job, f"stopped after step {progress.step}{why}; state saved, go on with --resume")
            return job.stop.exit_code if stop else int(not distributed.under_torchrun())


def read_batches(job: Job, window: Window) -> list[Any]:
    """The next step's micro-batches. Where a rank cannot have them, what was learnt is saved before the error."""
    failed: Exception | None = None
    batches: list[Any] = []
    window.start_waiting()
    try:
        batches = [next(job.batches) for _ in range(job.micro_batches)]
    except (DataError, WorkerError, OSError) as error:
        failed = faults.mendable(error)
    window.stop_waiting()
    if not job.ranks.any(failed is not None):
        return batches
    rescue(job, window)
    raise failed or distributed.PeerFailed


def take_step(job: Job, window: Window, batches: list[Any]) -> tuple[StepRecord, list[str]]:
    """`train_step`. Where it cannot be done, what was learnt before is saved, and the error names the recipe's key."""
    try:
        with faults.told(job):
            return train_step(job, batches)
    except (CommandError, Interrupted) as error:
        # Other ranks would wait for this one in their step; weights of which some are updated are those of no step.
        if job.ranks.size == 1 and not job.guard.updated:
            job.guard.undo()
            rescue(job, window)
        onward = f"goes on from state-{job.saved}.pt" if job.saved else "begins anew: no state was saved yet"
        if isinstance(error, Interrupted):
            say(job, f"stopped while step {job.progress.step + 1} was compiled; --resume {onward}")
            sys.exit(job.stop.exit_code)
        raise CommandError(f"{error}; --resume {onward}", error.exit_code) from None


def rescue(job: Job, window: Window) -> None:
    """Saves before an error goes on. Every rank calls it."""
    if job.progress.step == 0:
        return
    bad = window.check()
    if bad is not None:
        raise stop_before(job, bad, window.names) from None
    try:
        save(job)
    except (CommandError, OSError) as error:  # the first error matters more
        say(job, f"the state after step {job.progress.step} could not be saved: " + str(error).partition("\n")[0])
        return
    mended = "" if job.stop.requested else " once this is mended:"
    say(job, f"stopped after step {job.progress.step}; state saved, go on with --resume{mended}")


def due(step: int, every: int, steps: int) -> bool:
    """Whether something done `every` steps, and after the last, is due after `step`; never at step 0."""
    return step > 0 and (step % every == 0 or step == steps)


def out_of_patience(job: Job) -> bool:
    """Whether train.patience ends the run here; says so."""
    patience = job.recipe.train.patience
    if patience is None or job.progress.stale < patience:
        return False
    say(job, f"step {job.progress.step}: no better mIoU in {patience} evaluations (train.patience)")
    return True


def say(job: Job, text: str) -> None:
    """A line on stderr, above a progress bar; of several ranks one says it."""
    if job.ranks.main:
        tqdm.write(text, file=sys.stderr)


# ---- evaluating --------------------------------------------------------------------------------------------------
def evaluate(job: Job) -> bool:
    """Evaluates in float32, logs, keeps the best weights, draws pictures. False where a signal broke it off.

    The weights were saved, and so found finite, before; the state that says "evaluated" comes last.
    """
    from ssaseg.cli.scoring.evaluate import evaluate_model, state_protocol

    recipe, progress = job.recipe, job.progress
    started = time.perf_counter()
    job.stop.saved = True
    # Validation images come in many sizes; each would be tuned, and compiled, for.
    tuned, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    stance = torch.compiler.set_stance("force_eager") if recipe.train.compile else contextlib.nullcontext()
    try:
        with job.averaged(), stance, faults.told(job, evaluation=True):
            job.ranks.same_statistics(job.model)
            confusion = evaluate_model(
                job.model,
                job.val_set,
                recipe.test.model_dump(),
                recipe.data.mean,
                recipe.data.std,
                job.device,
                workers=min(recipe.train.workers, 1),
                stop=job.stop,
                ranks=job.ranks,
            )
            take_score(job, confusion, state_protocol(recipe.test, "val", len(job.val_set), len(job.val_set)), started)
    except Interrupted:
        say(job, f"stopped while evaluating step {progress.step}; state saved, go on with --resume")
        return False
    finally:
        job.stop.saved = False
        torch.backends.cudnn.benchmark = tuned
    save(job)
    return True


def take_score(job: Job, confusion: Any, statement: str, started: float) -> None:
    """Logs an evaluation begun at `started`, keeps its weights if they are the best so far, and draws it."""
    progress, scores = job.progress, confusion.scores()
    # JSON has no NaN; it stands here for "nothing was labelled".
    figures = {key: None if isnan(scores[key]) else scores[key] for key in ("mIoU", "aAcc", "mAcc")}
    progress.evaluated, progress.scores = progress.step, {**figures, "statement": statement}
    seconds = time.perf_counter() - started
    if job.log is not None:
        ious = dict(
            zip(job.val_set.classes, (None if isnan(iou) else float(iou) for iou in scores["IoU"]), strict=True)
        )
        job.log.write({"step": progress.step, **figures, "IoU": ious, "eval_seconds": round(seconds, 2)})
    say(job, f"step {progress.step}: mIoU {scores['mIoU']:.2f} %, aAcc {scores['aAcc']:.2f} % ({seconds:.0f} s)")
    miou = figures["mIoU"] or 0.0
    progress.stale += 1
    if miou > progress.best_miou:
        progress.best_miou, progress.stale = miou, 0
        save_best(job)
    if job.ranks.main:
        after_evaluation(job, confusion)


def rehearse(job: Job) -> int:
    """`--dry-run`: one step of everything, then memory and time to expect. Writes nothing."""
    started = time.perf_counter()
    set_learning_rate(job, 0)
    batches = [next(job.batches) for _ in range(job.micro_batches)]
    with faults.told(job):
        record, names = train_step(job, batches)
    if bool(record.bad):
        values = ", ".join(f"{name} {value:g}" for name, value in zip(names, record.losses.tolist(), strict=True))
        images = ", ".join(record.images)
        raise FloatingPointError(f"step 1: a loss or gradient is not finite ({values})\nimages: {images}")
    seconds = time.perf_counter() - started
    if job.device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB of GPU memory"
    else:
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is bytes there, KiB elsewhere
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.0f} MiB of resident memory"
    total = int(seconds * job.recipe.train.steps)
    clock = f"{total // 3600} h {total % 3600 // 60} min {total % 60} s"
    if job.ranks.main:
        for line in describe_groups(job.optimizer):
            click.echo(f"{job.recipe.optim.kind}: {line}")
        click.echo(f"dry run: one step took {seconds:.2f} s (the first is slow) and {memory} at its peak")
        click.echo(f"all {job.recipe.train.steps} steps: at most {clock} without evaluation; nothing was written")
    return 0
