"""The training state: all that a run needs to resume as if it had never stopped. Each save writes one file."""

import contextlib
import errno
import io
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.training.job import Progress
from ssaseg.cli.training.stored import require_state
from ssaseg.cli.weights.archive import read_archive
from ssaseg.files.writing import delete_temporaries, write_atomic
from ssaseg.recipes.resuming import FREE_KEYS, flat


def save_state(
    folder: Path,
    progress: Progress,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    recipe: dict[str, Any],
    extra: dict[str, Any] | None = None,
) -> None:
    """Writes `state-<step>.pt` atomically, then deletes all states except the newest `train.keep`.

    Random draws are functions of seed and step, so no generator needs to be stored. `extra`: what else the run needs to
    resume, plain values and tensors; `load_state` returns it under that key. Raises CommandError if the file cannot be
    written; the message names the state that the run can resume from.
    """
    content = {
        "progress": asdict(progress),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "recipe": recipe,
        "extra": extra or {},
    }
    path = folder / f"state-{progress.step}.pt"
    try:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomic(path, buffer.getvalue(), root=folder)
    except (OSError, RuntimeError, MemoryError) as error:
        newest = next(iter(state_files(folder)), None)
        last = f"{newest.name} is still the last good state" if newest else "no state was saved before"
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            fix = "free some disk space (train.keep=1 needs least)" if full else "make the folder writable again"
            raise CommandError(f"{path}: {error.strerror}\n{last}\n{fix}, then continue with --resume") from None
        # PyTorch's writer raises RuntimeError where memory ends while it puts a state together.
        what = "not enough memory to put the state together"
        raise CommandError(f"{path}: {what}\n{last}\nfree some memory, then continue with --resume") from None
    _delete_old(folder, path, recipe["train"]["keep"])


def _delete_old(folder: Path, written: Path, keep: int) -> None:
    """Deletes states older than the newest `keep`, and incomplete files of a killed run."""
    with contextlib.suppress(OSError):  # some file systems cannot do this; then they decide the order
        # After a power cut, the old states must not be gone while the new one's name is not yet on the disk.
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    delete_temporaries(folder)
    states = state_files(folder)
    old = states[states.index(written) + keep :] if written in states else []
    for path in old:
        with contextlib.suppress(OSError):  # an old file that stays is not a reason to stop
            os.unlink(path)


def state_files(folder: Path) -> list[Path]:
    """The states in `folder`, the newest first."""
    numbered = {path: path.stem.removeprefix("state-") for path in folder.glob("state-*.pt")}
    return sorted((path for path, step in numbered.items() if step.isdecimal()), key=lambda path: -int(numbered[path]))


def load_state(folder: Path) -> dict[str, Any] | None:
    """The newest state in `folder` that can be read, on the CPU; None if the run was stopped before its first save.

    Prints which states cannot be read, and renames them to `*.unreadable`. Raises CommandError if none can be read.
    """
    broken: list[Path] = []
    reasons: list[str] = []
    for path in state_files(folder):
        try:
            state = _read(path)
        except Exception as error:
            if out_of_memory(error):  # this does not mean that the file is damaged
                raise CommandError(f"{path}: not enough memory to read it\nfree some memory, then resume") from None
            broken.append(path)
            reasons.append(f"{type(error).__name__}: {error}".splitlines()[0][:120])
            continue
        if broken:
            names = ", ".join(bad.name for bad in broken)
            text = f"{folder}: {names} cannot be read ({reasons[0]}); continuing from the last good state, {path.name}"
            echo(f"warning: {text}", err=True)
        for bad in broken:
            with contextlib.suppress(OSError):
                bad.rename(bad.with_name(f"{bad.name}.unreadable"))
        return state
    if not broken:
        return None
    raise CommandError(
        f"{broken[0]}: the training state cannot be read ({reasons[0]}), and no older state can be read either\n"
        f"start a new run from the last weights: model.pretrained={folder / 'last.safetensors'}"
    )


def _read(path: Path) -> dict[str, Any]:
    """Reads and checks a state. Raises many types of errors for what is not a whole state after the step in its name.

    PyTorch would notice a file that was cut short, but not changed bytes: the checksums in it show these.
    """
    state = read_archive(path)
    require_state(state, int(path.stem.removeprefix("state-")))
    return dict(state)


def out_of_memory(error: Exception) -> bool:
    """Whether memory of the host has ended: Python and PyTorch have different errors for it."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def refuse_changes(stored: dict[str, Any], given: dict[str, Any], folder: Path) -> None:
    """Raises CommandError if the recipe of a resumed run has changes that would change its results.

    Other changes are printed in one line.
    """
    old, new = flat(stored), flat(given)
    changed = {
        key: _difference(key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }
    refused = [text for key, text in changed.items() if key not in FREE_KEYS]
    if refused:
        shown, own = ", ".join(refused[:3]), shlex.quote(str(folder))
        best = next((folder / f"{name}.safetensors" for name in ("best", "last")
                     if (folder / f"{name}.safetensors").exists()), None)  # fmt: skip
        new_run = "or start a new run with another --out"
        if "train.steps" in changed and best is not None:
            # Learning rates depend on the number of steps: the finished steps belong to another schedule.
            new_run += f"; to train longer, start it with model.pretrained={shlex.quote(str(best))}"
        raise CommandError(
            f"{folder}: the recipe is not the one this run was started with: {shown}{' …' if refused[3:] else ''}\n"
            f"resume it with: ssaseg train {own} --resume\n{new_run}"
        )
    if changed:
        notes = [text + (f" ({FREE_KEYS[key]})" if FREE_KEYS[key] else "") for key, text in changed.items()]
        echo(f"{folder}: continues with {', '.join(notes)}", err=True)


def _difference(key: str, old: Any, new: Any) -> str:
    """A changed value, as short text. For lists, such as the classes: the first entry that differs."""
    if isinstance(old, list) and isinstance(new, list) and max(len(old), len(new)) > 4:
        at = next((k for k, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), None)
        return f"{key}: {len(old)} → {len(new)} entries" if at is None else f"{key}[{at}] {old[at]} → {new[at]}"
    return f"{key} {old} → {new}"
