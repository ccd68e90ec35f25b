"""`ssaseg train`: one visible loop."""

import contextlib
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

import torch

from ssaseg.cli.console import about
from ssaseg.cli.device import select_device
from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.ranks import ranks as distributed
from ssaseg.cli.signals import Interrupted
from ssaseg.cli.training import faults
from ssaseg.cli.training.build import build_job
from ssaseg.cli.training.folder import open_run, write_start
from ssaseg.cli.training.job import Job, StepRecord
from ssaseg.cli.training.log import MetricsLog, keep_printed
from ssaseg.cli.training.nonfinite import stop_before
from ssaseg.cli.training.optimiser import describe_groups
from ssaseg.cli.training.pictures import after_evaluation, write_batch, write_card
from ssaseg.cli.training.preflight import describe, deterministic
from ssaseg.cli.training.saving import complete, save, save_best
from ssaseg.cli.training.step import set_learning_rate, train_step
from ssaseg.cli.training.trackers import Tracker, open_trackers
from ssaseg.cli.training.window import Window
from ssaseg.datasets import DataError
from ssaseg.datasets.workers import WorkerError
from ssaseg.models import list_mask_models
from ssaseg.models.masks.base import no_training
from ssaseg.recipes import Recipe, parse_recipe

# Device types on which to read a verdict costs no waiting time: there it is read after every step.
READY = {"cpu"}
TRIED = 3  # steps that a dry run times, after a first one that starts workers and allocates memory


def run_train(
    recipe: Recipe,
    out: Path,
    resume: bool,
    device: str,
    dry_run: bool,
    check: str = "sample",
    max_hours: float | None = None,
    track: Sequence[str] = (),
    verbose: bool = False,
) -> int:
    """Trains `recipe` in the folder `out`. Returns the exit code: 0 if training is done; with the state saved, 1 after
    `max_hours` and 130 / 143 after a signal. Under torchrun 0 after `max_hours`: after any other code torchrun would
    start the run again. verbose: whether each line of the log is followed by the terms of its loss.

    Raises CommandError for what the user can fix, FloatingPointError if a loss or a weight is not finite.
    """
    deadline = None if max_hours is None else time.monotonic() + max_hours * 3600
    chosen = select_device(device)
    require_possible(recipe, chosen, resume, dry_run)
    with contextlib.ExitStack() as stack:
        stack.enter_context(deterministic(recipe.train.deterministic))
        ranks = stack.enter_context(distributed.connect(chosen))
        trackers: list[Tracker] = []
        stored = lock = None
        restarted = ranks.any(distributed.was_restarted())
        if ranks.main and not dry_run:
            trackers = open_trackers(track, out, recipe)
            run = stack.enter_context(open_run(out, recipe, resume, restarted, ranks.size))
            recipe, stored, lock = run.recipe, run.stored, run.lock
            printed = stack.enter_context(keep_printed())
        sent, stored = ranks.broadcast((recipe.model_dump(mode="json"), stored))
        if not ranks.main:
            recipe = parse_recipe(sent, str(out))
        job = build_job(recipe, out, ranks, stored, check, dry_run)
        if ranks.main:
            describe(job)
        if dry_run:
            return try_steps(job)
        job.deadline, job.lock = deadline, lock
        if ranks.main:
            write_start(job)
            printed.start(out / "train.log", lock)
            if stored is not None:
                complete(job)
            open_log(job, trackers)
            stack.callback(close_all, trackers)
        with job.stop, contextlib.closing(Window(job, verbose=verbose)) as window:
            try:
                return train(job, window)
            finally:
                if job.stop.requested:
                    job.stop.ignore_signals()


def require_possible(recipe: Recipe, device: torch.device, resume: bool, dry_run: bool) -> None:
    """Raises CommandError if the arguments contradict each other or the device, and for a mask method."""
    if recipe.model.name in list_mask_models():
        raise CommandError(f"recipe {recipe.name}, model.name: {no_training(recipe.model.name)}")
    if recipe.train.amp == "fp16" and device.type == "cpu":
        raise CommandError("train.amp: fp16 needs a GPU\nexpected off or bf16 on a CPU; use train.amp=bf16")
    if dry_run and resume:
        raise CommandError("--dry-run uses no run folder, so it has nothing to resume\nleave out --resume")


def open_log(job: Job, trackers: Sequence[Tracker]) -> None:
    """Opens `metrics.jsonl`, and draws the first batch."""
    job.log = MetricsLog(job.folder / "metrics.jsonl", job.progress.step, job.progress.evaluated, trackers, job.lock)
    if not (job.folder / "batch.png").exists():
        write_batch(job)


def close_all(trackers: Sequence[Tracker]) -> None:
    """Lets trackers write or send what they still hold."""
    for tracker in trackers:
        tracker.close()


def train(job: Job, window: Window) -> int:
    """The loop. Returns the exit code."""
    recipe, progress = job.recipe, job.progress
    while True:
        # A resumed run does not repeat an evaluation that was already done.
        pending = progress.evaluated < progress.step
        if pending and due(progress.step, recipe.train.eval_every, job.steps):
            with window.paused():
                finished = evaluate(job)
            if not finished:
                return job.stop.exit_code
        if progress.step == job.steps or out_of_patience(job):
            say(job, f"done: best mIoU {progress.best_miou:.2f} %, run folder {job.folder}\n{next_commands(job)}")
            return 0

        rate = set_learning_rate(job, progress.step)
        batches = read_batches(job, window)
        record, names = take_step(job, window, batches)
        progress.step += 1
        window.add(record, names)

        log, save_now, evaluate_next = (
            due(progress.step, every, job.steps)
            for every in (recipe.train.log_every, recipe.train.save_every, recipe.train.eval_every)
        )
        stop = job.ranks.agree(job.stop)
        late = job.deadline is not None and job.ranks.any(time.monotonic() > job.deadline)
        # To read a verdict makes a GPU wait. So it is read only to log, and before what depends on it.
        if log or save_now or evaluate_next or stop or late or job.device.type in READY:
            bad = window.check()
            if bad is not None:
                raise stop_before(job, bad, names)
        if log:
            window.write(rate)
        if save_now or evaluate_next or stop or late:
            with window.paused():
                save(job)
        if stop or (late and progress.step < job.steps):
            job.stop.saved = True
            why = "" if stop else " because --max-hours is over"
            say(job, f"stopped after step {progress.step}{why}; state saved, continue with --resume")
            return job.stop.exit_code if stop else int(not distributed.under_torchrun())


def read_batches(job: Job, window: Window) -> list[Any]:
    """The micro-batches of the next step. If a rank cannot load them, the finished steps are saved before the error."""
    failed: Exception | None = None
    batches: list[Any] = []
    window.start_waiting()
    try:
        with job.stop.ending_waits():
            batches = [next(job.batches) for _ in range(job.micro_batches)]
    except (DataError, WorkerError, OSError, Interrupted) as error:
        failed = faults.explain_file_error(error)
    window.stop_waiting()
    if not job.ranks.any(failed is not None):
        return batches
    stopped = job.ranks.agree(job.stop)
    save_finished_steps(job, window)
    if stopped and isinstance(failed, Interrupted | None):
        if job.progress.step == 0:
            say(job, "stopped while waiting for the first images; nothing was saved yet")
        sys.exit(job.stop.exit_code)
    raise failed or distributed.PeerFailed


def take_step(job: Job, window: Window, batches: list[Any]) -> tuple[StepRecord, list[str]]:
    """`train_step`. If it fails, the finished steps are saved, and the error names the recipe's key."""
    try:
        with faults.explained(job):
            return train_step(job, batches)
    except (CommandError, Interrupted) as error:
        # Not with several ranks: the others would wait for this one in their step. Not during an update: weights of
        # which only some are updated belong to no step.
        if job.ranks.size == 1 and not job.guard.updated:
            job.guard.undo()
            save_finished_steps(job, window)
        saved = f"continues from state-{job.saved}.pt" if job.saved else "starts again: no state was saved yet"
        if isinstance(error, Interrupted):
            say(job, f"stopped while step {job.progress.step + 1} was compiled; --resume {saved}")
            sys.exit(job.stop.exit_code)
        raise CommandError(f"{error}; --resume {saved}", error.exit_code) from None


def save_finished_steps(job: Job, window: Window) -> None:
    """Saves the state before an error ends the run, and prints that. Every rank calls it.

    Raises FloatingPointError if one of the steps since the last look at the verdicts was bad.
    """
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
    when = "" if job.stop.requested else " once this is fixed:"
    say(job, f"stopped after step {job.progress.step}; state saved, continue with --resume{when}")


def due(step: int, every: int, steps: int) -> bool:
    """Whether something that is done `every` steps, and after the last step, is due after `step`; never at step 0."""
    return step > 0 and (step % every == 0 or step == steps)


def out_of_patience(job: Job) -> bool:
    """Whether train.patience ends the run at this step. If so, prints it."""
    patience = job.recipe.train.patience
    if patience is None or job.progress.stale < patience:
        return False
    say(job, f"step {job.progress.step}: no better mIoU in {patience} evaluations (train.patience)")
    return True


def next_commands(job: Job) -> str:
    """What to run when training is done."""
    best = shlex.quote(str(job.folder / "best.safetensors"))
    files = job.val_set.image_files
    images = shlex.quote(str(files[0].parent)) if files else "IMAGES"
    return f"next: ssaseg eval {best}\n      ssaseg predict {best} {images} --out labels"


def say(job: Job, text: str) -> None:
    """Prints a line on stderr, above a progress bar. Of several ranks only rank 0 prints it."""
    if job.ranks.main:
        echo(text, err=True)


# ---- evaluating --------------------------------------------------------------------------------------------------
def evaluate(job: Job) -> bool:
    """Evaluates in float32, logs, keeps the best weights, draws pictures. False if a signal interrupted it.

    A folded copy of the network computes, as in `ssaseg eval`, so that this prints the same score for the weights that
    are kept. It takes the memory of the parameters once more, at a time when a step's activations take none.

    The weights were saved before this, so it is known that they are finite. The state that says "evaluated" is saved
    last.
    """
    from ssaseg.cli.scoring.engines import TorchEngine
    from ssaseg.cli.scoring.evaluate import evaluate_model, state_protocol

    recipe, progress = job.recipe, job.progress
    started = time.perf_counter()
    job.stop.saved = True
    # Validation images have many sizes: cuDNN would be tuned, and the network compiled, for each of them.
    tuned, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    stance = torch.compiler.set_stance("force_eager") if recipe.train.compile else contextlib.nullcontext()
    try:
        with job.averaged(), stance, faults.explained(job, evaluation=True):
            job.ranks.same_statistics(job.model)
            engine = TorchEngine.of(job.model, job.device)
            confusion = evaluate_model(
                engine,
                job.val_set,
                recipe.test.model_dump(),
                recipe.data.mean,
                recipe.data.std,
                job.device,
                workers=min(recipe.train.workers, 1),
                stop=job.stop,
                ranks=job.ranks,
            )
            count = len(job.val_set)
            statement = f"{state_protocol(recipe.test, 'val', count, count)}; computed by {engine.what}"
            take_score(job, confusion, statement, started)
    except Interrupted:
        say(job, f"stopped while evaluating step {progress.step}; state saved, continue with --resume")
        return False
    finally:
        job.stop.saved = False
        torch.backends.cudnn.benchmark = tuned
    save(job)
    return True


def take_score(job: Job, confusion: Any, statement: str, started: float) -> None:
    """Logs an evaluation that began at `started` [s], keeps its weights if they are the best so far, draws pictures."""
    progress, scores = job.progress, confusion.scores()
    # NaN means that nothing was labelled. JSON has no NaN: it becomes null.
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
            write_card(job, confusion)
    if job.ranks.main:
        after_evaluation(job, confusion)


def try_steps(job: Job) -> int:
    """`--dry-run`: computes some steps, then prints the memory and time to expect. Writes nothing. Returns 0."""
    seconds: list[float] = []
    while len(seconds) < min(1 + TRIED, job.steps):
        started = time.perf_counter()
        set_learning_rate(job, job.progress.step)
        batches = [next(job.batches) for _ in range(job.micro_batches)]
        with faults.explained(job):
            record, names = train_step(job, batches)
        job.progress.step += 1
        if bool(record.bad):  # waits for the device
            values = ", ".join(f"{name} {value:g}" for name, value in zip(names, record.losses.tolist(), strict=True))
            images = ", ".join(record.images)
            what = f"step {job.progress.step}: a loss or gradient is not finite ({values})"
            raise FloatingPointError(f"{what}\nimages: {images}")
        seconds.append(time.perf_counter() - started)
    first, *others = seconds
    one, timed = statistics.mean(others or seconds), f"mean of {len(others)}" if others else "the only one"
    if job.device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB of GPU memory"
    else:
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS, otherwise in KiB
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.0f} MiB of resident memory"
    if job.ranks.main:
        for line in describe_groups(job.optimizer):
            echo(f"{job.recipe.optim.kind}: {line}")
        echo(f"dry run: one step took {one:.2f} s ({timed}; the first took {first:.2f} s)")
        echo(f"memory: {memory} at its peak")
        echo(f"all {job.steps} steps: {about(one * job.steps)} without evaluation; nothing was written")
    return 0
