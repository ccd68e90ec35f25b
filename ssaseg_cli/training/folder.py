"""The run folder: who may write into it, the state that a run goes on from, and the files that say what was run."""

import contextlib
import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssaseg.cli.errors import CommandError
from ssaseg.cli.training import environment as records
from ssaseg.cli.training.state import load_state, refuse_changes, state_files
from ssaseg.models.checkpoint import write_atomic
from ssaseg.recipes import Recipe, dump_recipe, parse_recipe

if TYPE_CHECKING:
    from ssaseg.cli.training.job import Job


LOCK = ".lock"


@dataclass
class RunFolder:
    """A folder that no other run writes into."""

    path: Path
    recipe: Recipe  # as it was given; a micro-batch that a run has found by itself stays
    stored: dict[str, Any] | None  # the state to go on from; None: from the start


@contextlib.contextmanager
def open_run(out: Path, recipe: Recipe, resume: bool, restarted: bool = False, ranks: int = 1) -> Iterator[RunFolder]:
    """Holds the run folder `out`, made if need be, while the context lasts; `ranks`: how many compute the run.

    restarted: by a supervisor, after a failure: resumed, also where nothing was saved yet, if that run was its own.
    Raises CommandError where `out` does not fit the wish, cannot be written, or another run writes into it.
    """
    if resume and not restarted and not is_run(out):
        taken = out.is_dir() and any(path.name != LOCK for path in out.iterdir())
        mend = "name the run's folder with --out" if taken else "start one without --resume"
        raise CommandError(f"{out}: no run to resume here (neither config.yaml nor state-*.pt)\n{mend}")
    made = not out.exists()
    # A lock's name that is there before us was left by a run that failed. One that was refused leaves none: its
    # restart would else go on with the run that it found here.
    failed = (out / LOCK).exists()
    file, begun = _lock(out), False
    try:
        run = _resumed(out, recipe, ranks) if resume or (restarted and failed) else _begun(out, recipe)
        begun = True
        yield run
        begun = False
    finally:
        if not begun or not (out / "config.yaml").exists():
            with contextlib.suppress(OSError):
                (out / LOCK).unlink()
                if made:
                    out.rmdir()  # with anything in it the system refuses
        os.close(file)


def is_run(out: Path) -> bool:
    """Whether a run was begun in the folder. A state alone suffices to go on, as the recipe is in it."""
    return (out / "config.yaml").exists() or bool(state_files(out))


def _begun(out: Path, recipe: Recipe) -> RunFolder:
    if any(path.name != LOCK for path in out.iterdir()):
        mend = "go on in it with --resume, or choose another --out" if is_run(out) else "choose another --out"
        raise CommandError(f"{out}: the run folder is not empty\n{mend}")
    return RunFolder(out, recipe, None)


def _resumed(out: Path, recipe: Recipe, ranks: int) -> RunFolder:
    stored = load_state(out)
    if stored is None:
        if (out / "last.safetensors").exists():
            raise CommandError(
                f"{out}: no state-*.pt beside last.safetensors, so the run cannot go on\n"
                f"start a new one with --out and model.pretrained={out / 'last.safetensors'}"
            )
        return RunFolder(out, recipe, None)
    # Parsed, so that keys which came after the run was begun have the default that it went by.
    before = parse_recipe(stored["recipe"], str(out))
    if not (out / "config.yaml").exists():
        click.echo(f"note: {out / 'config.yaml'}: was missing, written anew from the state", err=True)
        write_atomic(out / "config.yaml", dump_recipe(before).encode())
    found = before.train.micro_batch
    # What does not cut a rank's share, now that there are more or fewer ranks, is to be found anew.
    if recipe.train.micro_batch == "auto" and isinstance(found, int) and recipe.train.batch // ranks % found == 0:
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch": found})})
    refuse_changes(before.model_dump(mode="json"), recipe.model_dump(mode="json"), out)
    return RunFolder(out, recipe, stored)


def _lock(out: Path) -> int:
    """A descriptor of `out/.lock`, locked. The system lets go of it when the process ends, however it ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        return _locked_file(out / LOCK)
    except OSError as error:
        mend = "choose another with --out"
        if (out / "config.yaml").exists():
            mend = "make it writable, or copy it and go on in the copy: --out COPY --resume"
        raise CommandError(f"{out}: the run folder cannot be written ({error.strerror})\n{mend}") from None


def _locked_file(path: Path) -> int:
    """A descriptor of the lock file, locked. Not to be opened again in this process: closing it would unlock it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # A lock of the process: unlike flock's, workers that outlive a killed run for a moment do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                click.echo(f"note: {path.parent}: no locks on this file system; begin no second run in it", err=True)
                return file
            owner = os.read(file, 200).decode(errors="replace").strip()
            os.close(file)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise CommandError(
                f"{path.parent}: another run writes into this folder ({owner or 'it just began'})\n"
                "wait for its end, stop it (SIGTERM makes it save first), or choose another --out"
            ) from None
        # The run that held it before takes its name away as it ends: then what we have locked is no file any more.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                os.truncate(file, 0)
                os.write(file, f"process {os.getpid()} on {platform.node()}\n".encode())
                return file
        os.close(file)


def write_start(job: "Job") -> None:
    """`config.yaml`, the recipe as it is run, and `env.json`: once for the run's beginning, an entry more each time
    that it goes on.
    """
    write_atomic(job.folder / "config.yaml", dump_recipe(job.recipe).encode())
    records.write_environment(job.folder / "env.json", records.environment(job), job.progress.step)
