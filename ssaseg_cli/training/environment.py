"""What a run records about its environment: versions, machine, command, and a fingerprint of its data, with which a
resumed run checks that they are still the same.
"""

import contextlib
import hashlib
import json
import platform
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.training.log import LAST_STEP
from ssaseg.files.structured import read_json
from ssaseg.files.text import printable
from ssaseg.files.writing import write_atomic

if TYPE_CHECKING:
    from ssaseg.cli.training.job import Job
    from ssaseg.datasets import Dataset


# What decides how sums are rounded. If one of these has changed, a resumed run is no longer equal bit for bit.
ROUNDING = ("torch", "cuda", "cudnn", "device", "gpu", "cpu", "threads", "ranks")

LONGEST = 200  # letters of a value that decides rounding: a device's name at most


def environment(job: "Job") -> dict[str, Any]:
    """The machine, the versions and the data of a run, as JSON values."""
    import torch  # here, as `compare` only reads what is written

    on_gpu = job.device.type == "cuda"
    found = (each.metadata for each in metadata.distributions())  # each access reads and parses a file
    installed = {each["Name"]: each["Version"] for each in found}
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
        changed = [printable(f"{key} {first[key]} → {other[key]}") for key in ROUNDING if key in other]
        if changed:
            effect = "results are equal except for rounding, not bit for bit"
            if "ranks" in other:
                effect = "BatchNorm sees other groups of images"
            echo(f"note: since this run was started: {', '.join(changed)}; from here on {effect}", err=True)
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode(), root=path.parent)


def _first(path: Path) -> dict[str, Any]:
    """What `env.json` says about the start of the run; {} if it cannot be read. It is then renamed: the run does not
    need this file.
    """
    try:
        return read_environment(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        pass
    renamed = path.with_name(f"{path.name}.unreadable")
    with contextlib.suppress(OSError):
        path.rename(renamed)
    echo(f"warning: {path}: cannot be read, kept as {renamed.name}; a new one starts at this step", err=True)
    return {}


def read_environment(path: Path) -> dict[str, Any]:
    """An `env.json`. What decides rounding is text, a whole number or None, and `resumed` is a list of objects with a
    whole number as `step`. Raises OSError, and ValueError for other content.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"a JSON {type(content).__name__}, not an object")
    resumed = content.get("resumed", [])
    if not isinstance(resumed, list) or not all(
        isinstance(each, dict) and _is_step(each.get("step")) for each in resumed
    ):
        raise ValueError("resumed is not a list of entries with a step")
    for key in ROUNDING:
        if not isinstance(content.get(key), str | int | None) or len(str(content.get(key))) > LONGEST:
            raise ValueError(f"{key} is not a short text")
    return content


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LAST_STEP


def resumptions(folder: Path) -> list[int]:
    """The steps after which the run in `folder` was resumed, from its env.json."""
    try:
        return [entry["step"] for entry in read_environment(folder / "env.json").get("resumed", [])]
    except (OSError, ValueError):
        return []


def fingerprints(train_set: "Dataset", val_set: "Dataset") -> dict[str, Any]:
    """`fingerprint` of both splits, by name."""
    return {"train": fingerprint(train_set), "val": fingerprint(val_set)}


def fingerprint(dataset: "Dataset") -> dict[str, Any]:
    """What identifies a data set: its number of images, its classes, and SHA-256 sums over the images' names and over
    the sizes of all files [bytes]. If there are no files, over the numbers that decide what is drawn.

    Reads no file. So a mask whose labels have changed, but not its file size, is not noticed. Raises OSError if a file
    is missing.
    """
    names = [dataset.name(index) for index in range(len(dataset))]
    sums = {key: hashlib.sha256("\n".join(text).encode(errors="surrogateescape")).hexdigest()
            for key, text in (("names", names), ("content", dataset.identity()))}  # fmt: skip
    return {"images": len(names), "classes": list(dataset.classes), **sums}


def require_same_data(before: dict[str, Any] | None, now: dict[str, Any], folder: Path) -> None:
    """Raises CommandError if a resumed run has other data than it was started with (`before`; None: not known)."""
    for split, old in (before or {}).items():
        new = now[split]
        if old == new:
            continue
        if old["images"] != new["images"]:
            found = f"{new['images']} images now, {old['images']} when the run was started"
        elif old["classes"] != new["classes"]:
            pairs = zip(old["classes"], new["classes"], strict=False)
            differ = [f"class {k} is {b}, was {a}" for k, (a, b) in enumerate(pairs) if a != b]
            found = differ[0] if differ else f"{len(new['classes'])} classes now, {len(old['classes'])} before"
        elif old["names"] != new["names"]:
            found = f"{new['images']} images as before, but with other names"
        else:
            found = "the same names, but other file sizes: images, masks or annotations were changed"
        raise CommandError(
            f"{folder}: the {split} split is not the one that this run was started with: {found}\n"
            "expected the same data: their number and order decide which images a step sees\n"
            f"restore them (or data.root), or start a new run: --out, model.pretrained={folder / 'last.safetensors'}"
        )
