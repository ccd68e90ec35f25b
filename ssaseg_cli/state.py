"""The training state: everything that a resumed run needs to go on as if it had never stopped, in one file."""

import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ssaseg.cli.console import CommandError
from ssaseg.models.checkpoint import write_atomic

FILE = "state.pt"
# Keys that may differ between a run and its resumption without changing what is computed.
FREE_KEYS = {
    "name",
    "data.root",
    "data.cache",
    "train.workers",
    *(f"train.{key}_every" for key in ("log", "eval", "save")),
}


@dataclass
class Progress:
    """Where a run stands. `step` counts finished optimiser steps; positions in the data follow from it."""

    step: int = 0
    evaluated: int = 0
    best_miou: float = -1.0
    scores: dict[str, Any] = field(default_factory=dict)


def save_state(
    folder: Path,
    progress: Progress,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    recipe: dict[str, Any],
) -> None:
    """Writes the state atomically. Random draws are functions of seed and step, so no generator needs to be stored."""
    buffer = io.BytesIO()
    content = {
        "progress": asdict(progress),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "recipe": recipe,
    }
    torch.save(content, buffer)
    write_atomic(folder / FILE, buffer.getvalue())


def load_state(folder: Path) -> dict[str, Any] | None:
    """The state saved in `folder`, None where a run was stopped before its first save. Errors: CommandError."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CommandError(
            f"{path}: the training state cannot be read ({type(error).__name__})\n"
            f"the weights in {folder / 'last.safetensors'} can start a new run: model.pretrained"
        ) from None


def refuse_changes(stored: dict[str, Any], given: dict[str, Any], folder: Path) -> None:
    """Raises CommandError where the recipe of a resumed run differs in anything that would change its results."""
    old, new = _flat(stored), _flat(given)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and key not in FREE_KEYS]
    if changed:
        shown = ", ".join(f"{key} {old.get(key)} → {new.get(key)}" for key in changed[:3])
        raise CommandError(
            f"{folder}: the recipe is not the one this run was started with: {shown}{' …' if changed[3:] else ''}\n"
            f"resume it with {folder / 'config.yaml'}, or start a new run with --out"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: list(tree) if isinstance(tree, tuple) else tree}
    return {
        key: leaf for name, part in tree.items() for key, leaf in _flat(part, f"{prefix}.{name}".lstrip(".")).items()
    }
