"""A fingerprint of a run's data sets, so that a resumed run can check that they are still the same."""

import hashlib
from pathlib import Path
from typing import Any

from ssaseg.cli.errors import CommandError
from ssaseg.datasets import Dataset


def fingerprints(train_set: Dataset, val_set: Dataset) -> dict[str, Any]:
    """`fingerprint` of both splits, by name."""
    return {"train": fingerprint(train_set), "val": fingerprint(val_set)}


def fingerprint(dataset: Dataset) -> dict[str, Any]:
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
