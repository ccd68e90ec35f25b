"""The training state: everything that a resumed run needs to go on as if it had never stopped, a file a save."""

import contextlib
import errno
import io
import os
import shlex
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from ssaseg.cli.errors import CommandError
from ssaseg.cli.training.job import Progress
from ssaseg.models.checkpoint import write_atomic

# Recipe keys that a resumed run may change, each with what becomes of the numbers; all others are refused.
FREE_KEYS = {
    "name": "",  # a label
    "data.root": "",  # where the data lie: their names and sizes are held by their fingerprint
    "data.cache": "",  # the same pixels, from memory
    "train.workers": "",  # a sample is a function of the seed and its position alone
    "train.prefetch": "",  # the same batches, earlier on the device
    "train.log_every": "",
    "train.save_every": "",
    "train.keep": "",
    "train.eval_every": "",  # evaluating draws nothing and writes no buffer; other weights may become the best
    "train.patience": "",  # decides when to end, not what is learnt until then
    # What to do in a case that stops a run otherwise: who resumes after it must be able to choose.
    "train.nonfinite": "",
    "train.max_skipped": "",
    # Other kernels for the same arithmetic.
    "train.compile": "the same to rounding",
    "train.deterministic": "the same to rounding",
    # Not harmless, but a long run must be able to go on with less memory: the step's batch and losses stay.
    "train.micro_batch": "BatchNorm sees other groups of images from here on",
}


def save_state(
    folder: Path,
    progress: Progress,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    recipe: dict[str, Any],
    extra: dict[str, Any] | None = None,
) -> None:
    """Writes `state-<step>.pt` atomically, then drops all but the newest `train.keep`.

    Random draws are functions of seed and step, so no generator needs to be stored. `extra`: what else the run goes on
    with, plain values and tensors; `load_state` gives it back under that key. Raises CommandError where the disk
    refuses, naming the state that the run can go on from.
    """
    buffer = io.BytesIO()
    content = {
        "progress": asdict(progress),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "recipe": recipe,
        "extra": extra or {},
    }
    torch.save(content, buffer)
    path = folder / f"state-{progress.step}.pt"
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        kept = next(iter(state_files(folder)), None)
        last = f"{kept.name} stays the last good state" if kept else "no state was saved before"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "make room (train.keep=1 needs least)" if full else "make the folder writable again"
        raise CommandError(f"{path}: {error.strerror}\n{last}\n{mend}, then go on with --resume") from None
    _drop_old(folder, path, recipe["train"]["keep"])


def _drop_old(folder: Path, written: Path, keep: int) -> None:
    """Removes states older than the newest `keep`, and what a killed run left half written."""
    with contextlib.suppress(OSError):  # not every file system can; then the order is its own
        # A power cut must not find the old states gone and the new one's name not yet on the disk.
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    states = state_files(folder)
    old = states[states.index(written) + keep :]
    for path in [*old, *folder.glob(".state*.partial")]:
        with contextlib.suppress(OSError):  # a file too many is no reason to stop
            os.unlink(path)


def state_files(folder: Path) -> list[Path]:
    """The states in `folder`, the newest first."""
    numbered = {path: path.stem.removeprefix("state-") for path in folder.glob("state-*.pt")}
    return sorted((path for path, step in numbered.items() if step.isdecimal()), key=lambda path: -int(numbered[path]))


def load_state(folder: Path) -> dict[str, Any] | None:
    """The newest state in `folder` that can be read, on the CPU; None where a run was stopped before its first save.

    One that cannot be read is told in a line and set aside as `*.unreadable`. Raises CommandError where none can.
    """
    broken: list[Path] = []
    reasons: list[str] = []
    for path in state_files(folder):
        try:
            state = _read(path)
        except MemoryError:  # says nothing about the file
            raise
        except Exception as error:
            broken.append(path)
            reasons.append(f"{type(error).__name__}: {error}".splitlines()[0][:120])
            continue
        if broken:
            names = ", ".join(bad.name for bad in broken)
            text = f"{folder}: {names} cannot be read ({reasons[0]}); going on from the last good state, {path.name}"
            click.echo(f"warning: {text}", err=True)
        for bad in broken:
            with contextlib.suppress(OSError):
                bad.rename(bad.with_name(f"{bad.name}.unreadable"))
        return state
    if not broken:
        return None
    raise CommandError(
        f"{broken[0]}: the training state cannot be read ({reasons[0]}), and there is no older one that can\n"
        f"the weights in {folder / 'last.safetensors'} can start a new run: model.pretrained"
    )


def _read(path: Path) -> dict[str, Any]:
    """A state, whole. PyTorch notices a file that was cut short, but not bytes that changed; the sums in it do."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"wrong checksum of {damaged}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    missing = {"progress", "model", "optimizer", "scaler", "recipe"} - state.keys()
    if missing:
        raise ValueError(f"no {', '.join(sorted(missing))} in it")
    return state


def refuse_changes(stored: dict[str, Any], given: dict[str, Any], folder: Path) -> None:
    """Raises CommandError where the recipe of a resumed run differs in what would change its results.

    Other differences are told in one line.
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
            # Learning rates follow from the number of steps: those that were made are of another schedule.
            new_run += f"; longer than it was planned: that and model.pretrained={shlex.quote(str(best))}"
        raise CommandError(
            f"{folder}: the recipe is not the one this run was started with: {shown}{' …' if refused[3:] else ''}\n"
            f"resume it by: ssaseg train {shlex.quote(str(folder / 'config.yaml'))} --out {own} --resume\n{new_run}"
        )
    if changed:
        notes = [text + (f" ({FREE_KEYS[key]})" if FREE_KEYS[key] else "") for key, text in changed.items()]
        click.echo(f"{folder}: goes on with {', '.join(notes)}", err=True)


def _difference(key: str, old: Any, new: Any) -> str:
    """A changed value, in a few words: of lists, such as the classes, the first entry that differs."""
    if isinstance(old, list) and isinstance(new, list) and max(len(old), len(new)) > 4:
        at = next((k for k, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), None)
        return f"{key}: {len(old)} → {len(new)} entries" if at is None else f"{key}[{at}] {old[at]} → {new[at]}"
    return f"{key} {old} → {new}"


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted key."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: list(tree) if isinstance(tree, tuple) else tree}
    return {
        key: leaf for name, part in tree.items() for key, leaf in flat(part, f"{prefix}.{name}".lstrip(".")).items()
    }
