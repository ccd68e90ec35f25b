"""What a run records about its environment: versions, machine, command, and a fingerprint of its data."""

import contextlib
import json
import platform
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from ssaseg.files.writing import write_atomic

if TYPE_CHECKING:
    from ssaseg.cli.training.job import Job


# What decides how sums are rounded. If one of these has changed, a resumed run is no longer equal bit for bit.
ROUNDING = ("torch", "cuda", "cudnn", "device", "gpu", "cpu", "threads", "ranks")


def environment(job: "Job") -> dict[str, Any]:
    """The machine, the versions and the data of a run, as JSON values."""
    on_gpu = job.device.type == "cuda"
    installed = {found.metadata["Name"]: found.version for found in metadata.distributions()}
    return {
        "command": ["ssaseg", *sys.argv[1:]],  # as it was typed, without the path of the program
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "ssaseg": installed.get("ssaseg"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "device": str(job.device),
        "gpu": torch.cuda.get_device_name(job.device) if on_gpu else None,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "ranks": job.ranks.size,
        "seed": job.recipe.train.seed,
        "packages": dict(sorted(installed.items(), key=lambda item: str(item[0]).lower())),
        "data": job.fingerprints,
    }


def write_environment(path: Path, now: dict[str, Any], step: int) -> None:
    """Writes `env.json`: `now` for a new run. If the run resumes after `step`, adds what has changed to `resumed`.

    A change of what decides rounding is also printed. If the file is missing or damaged, a new one starts at `step`.
    """
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    first = _first(path) if step else {}
    if not first:
        content = {"time": time, **({"step": step} if step else {}), **now}
    else:
        other = {key: value for key, value in now.items() if first.get(key) != value and key in first}
        content = {**first, "resumed": [*first.get("resumed", []), {"time": time, "step": step, **other}]}
        changed = [f"{key} {first[key]} → {other[key]}" for key in ROUNDING if key in other]
        if changed:
            effect = "results are equal except for rounding, not bit for bit"
            if "ranks" in other:
                effect = "BatchNorm sees other groups of images"
            click.echo(f"note: since this run was started: {', '.join(changed)}; from here on {effect}", err=True)
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


def _first(path: Path) -> dict[str, Any]:
    """What `env.json` says about the start of the run; {} if it cannot be read. It is then renamed: the run does not
    need this file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("resumed", []), list):
            return content
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        pass
    renamed = path.with_name(f"{path.name}.unreadable")
    with contextlib.suppress(OSError):
        path.rename(renamed)
    click.echo(f"warning: {path}: cannot be read, kept as {renamed.name}; a new one starts at this step", err=True)
    return {}


def resumptions(folder: Path) -> list[int]:
    """The steps after which the run in `folder` was resumed, from its env.json."""
    try:
        return [entry["step"] for entry in json.loads((folder / "env.json").read_text(encoding="utf-8"))["resumed"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
