"""The run folder: its lock, the state that a run resumes from, and the files that record what was run."""

import contextlib
import errno
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.training import environment as records
from ssaseg.cli.training.state import load_state, refuse_changes, state_files
from ssaseg.files.text import printable
from ssaseg.files.writing import FolderInUse, FolderLock, open_to_others, write_atomic
from ssaseg.recipes import Recipe, dump_recipe, parse_recipe

if TYPE_CHECKING:
    from ssaseg.cli.training.job import Job


LOCK = ".lock"


@dataclass
class RunFolder:
    """A folder that no other run writes into."""

    path: Path
    recipe: Recipe  # as it was given; in a resumed run with the numbers that `auto` and train.epochs became
    stored: dict[str, Any] | None  # the state to resume from; None: from the start
    lock: FolderLock | None = None


@contextlib.contextmanager
def open_run(out: Path, recipe: Recipe, resume: bool, restarted: bool = False, ranks: int = 1) -> Iterator[RunFolder]:
    """Locks the run folder `out`, created if necessary, for the duration of the context.

    `ranks`: how many ranks compute the run. `restarted`: a supervisor has started this process again after a failure:
    it resumes the run, even if nothing was saved yet, but only if that run was its own. Raises CommandError if `out`
    does not fit what was requested or cannot be written, or if another run writes into it.
    """
    if resume and not restarted and not is_run(out):
        taken = out.is_dir() and any(path.name != LOCK for path in out.iterdir())
        fix = "name the run's folder with --out" if taken else "start a run without --resume"
        raise CommandError(f"{out}: no run to resume in this folder (neither config.yaml nor state-*.pt)\n{fix}")
    made = not out.exists()
    # A lock file that already exists was left by a run that failed. A run that was refused leaves none: otherwise its
    # restart would continue the run that it found here.
    failed = (out / LOCK).exists()
    lock, failing = _lock(out), False
    if (place := open_to_others(out)) is not None:
        echo(
            f"warning: every user of this machine can write to {place}, and so change what --resume reads from {out}\n"
            f"take this right away: chmod o-w {shlex.quote(str(place))}",
            err=True,
        )
    try:
        run = _resumed_run(out, recipe, ranks) if resume or (restarted and failed) else _new_run(out, recipe)
        run.lock = lock
        failing = True  # until the context ends without an error
        yield run
        failing = False
    finally:
        ended = not failing or not (out / "config.yaml").exists()
        lock.release(delete=ended)
        if ended and made:
            with contextlib.suppress(OSError):  # the folder is not empty
                out.rmdir()


def is_run(out: Path) -> bool:
    """Whether a run was started in the folder. A state alone is enough to resume: it holds the recipe."""
    return (out / "config.yaml").exists() or bool(state_files(out))


def _new_run(out: Path, recipe: Recipe) -> RunFolder:
    if any(path.name != LOCK for path in out.iterdir()):
        fix = "continue its run with --resume, or choose another --out" if is_run(out) else "choose another --out"
        raise CommandError(f"{out}: the run folder is not empty\n{fix}")
    return RunFolder(out, recipe, None)


def _resumed_run(out: Path, recipe: Recipe, ranks: int) -> RunFolder:
    stored = load_state(out)
    if stored is None:
        if (out / "last.safetensors").exists():
            raise CommandError(
                f"{out}: last.safetensors exists, but no state-*.pt, so the run cannot be resumed\n"
                f"start a new run with --out and model.pretrained={out / 'last.safetensors'}"
            )
        return RunFolder(out, recipe, None)
    # Parsed, so that keys which are newer than the run have their defaults: the run was computed with these values.
    before = parse_recipe(stored["recipe"], str(out))
    if not (out / "config.yaml").exists():
        echo(f"note: {out / 'config.yaml'}: was missing; it was written again from the state", err=True)
        write_atomic(out / "config.yaml", dump_recipe(before).encode(), root=out)
    # The number of images that a run was started with gives its steps. Other data are refused later.
    counted = (stored.get("extra", {}).get("data") or {}).get("train")
    recipe = recipe.with_steps(counted["images"]) if counted else recipe
    found = before.train.micro_batch
    # With another number of ranks, a micro-batch that does not divide a rank's images must be found again.
    if recipe.train.micro_batch == "auto" and isinstance(found, int) and recipe.train.batch // ranks % found == 0:
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch": found})})
    refuse_changes(before.model_dump(mode="json"), recipe.model_dump(mode="json"), out)
    return RunFolder(out, recipe, stored)


def _lock(out: Path) -> FolderLock:
    """The lock of the run folder. The system releases it when the process ends, for any reason."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(out, LOCK)
    except FolderInUse as error:
        owner = printable(str(error)) or "it has just started"
        raise CommandError(
            f"{out}: another run writes into this folder ({owner})\n"
            "wait until it ends, stop it (with SIGTERM it saves first), or choose another --out"
        ) from None
    except OSError as error:
        fix = "choose another with --out"
        if error.errno in (errno.ELOOP, errno.EINVAL):
            fix = f"{out / LOCK} must be a file of its own: delete it, or choose another --out"
        elif (out / "config.yaml").exists():
            fix = "make it writable, or copy it and resume in the copy: --out COPY --resume"
        raise CommandError(f"{out}: the run folder cannot be written ({error.strerror})\n{fix}") from None
    if not lock.supported:
        echo(f"note: {out}: this file system has no locks; do not start a second run in it", err=True)
    return lock


def write_start(job: "Job") -> None:
    """Writes `config.yaml`, the recipe as it is run, and `env.json`, which gets one more entry at each resume."""
    job.require_folder()
    write_atomic(job.folder / "config.yaml", dump_recipe(job.recipe).encode(), root=job.folder)
    records.write_environment(job.folder / "env.json", records.environment(job), job.progress.step)
