"""Checkpoints: one safetensors file each. Its header is enough to rebuild the model, its classes and preprocessing."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ssaseg.files.writing import write_atomic
from ssaseg.models.build import build_model
from ssaseg.models.segmenter import Segmenter, is_below

FORMAT = "ssaseg-1"
# What each header has, besides `format, model, classifier, classes`. mean and std: ImageNet's, RGB in [0, 255].
DEFAULTS: Mapping[str, Any] = {
    "palette": None,
    "mean": [123.675, 116.28, 103.53],
    "std": [58.395, 57.12, 57.375],
    "protocol": {"scale": None, "multiple": None},
    "recipe": None,
    "step": 0,
    "scores": {},
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model. The message names the file and the fix."""


def save_model(
    path: str | os.PathLike[str], model: Segmenter, metadata: Mapping[str, Any], root: Path | None = None
) -> None:
    """Writes the whole state dict and `metadata` (JSON values) as safetensors, atomically.

    `format`, `model` and `classifier` come from the model, other missing keys from `DEFAULTS`. If `classes` is missing,
    the classes are numbered. `root`: see `write_atomic`. An existing file stays until the new one is complete on the
    disk. Raises ValueError if `classes` does not fit the model, OSError if the file cannot be written.
    """
    fixed = {"format": FORMAT, "model": model.name, "classifier": model.classifier_name}
    known = {**DEFAULTS, "classes": numbered(model.num_classes), **metadata, **fixed}
    if len(known["classes"]) != model.num_classes:
        raise ValueError(f"metadata names {len(known['classes'])} classes, the model has {model.num_classes}")
    write_tensors(Path(path), model.state_dict(), known, root)


def numbered(classes: int) -> list[str]:
    """Names for classes that have none."""
    return [f"class_{k}" for k in range(classes)]


def save_deploy(path: str | os.PathLike[str], model: Segmenter, metadata: Mapping[str, Any]) -> None:
    """Writes the deploy form: `deploy_tensors`, and `deploy` in the header. `load_model` reads this form too.

    Raises ValueError for a weight beyond float16's range, OSError if the file cannot be written.
    """
    fixed = {"format": FORMAT, "model": model.name, "classifier": model.classifier_name}
    deploy = {"weights": "float16", "without": model.training_only()}
    write_tensors(Path(path), deploy_tensors(model), {**DEFAULTS, **metadata, **fixed, "deploy": deploy})


def deploy_tensors(model: Segmenter) -> dict[str, torch.Tensor]:
    """The state dict without what only training needs. Tensors of two or more dimensions are float16.

    Biases, norms and their statistics stay float32: they are a few percent of the size, and a variance may be tiny or
    huge. Raises ValueError for a value beyond float16's range.
    """
    dropped = model.training_only()
    kept = {key: value for key, value in model.state_dict().items() if not is_below(key, dropped)}
    for key, value in kept.items():
        if value.is_floating_point() and value.dim() > 1:
            kept[key] = value.half()
            if not kept[key].isfinite().all():
                largest = value.abs().max().item()
                raise ValueError(f"{key} has values up to {largest:.3g}, the largest float16 is 65504")
    return kept


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any], root: Path | None = None
) -> None:
    """Writes tensors as safetensors, atomically, with `header` (JSON values). `root`: see `write_atomic`."""
    stored = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_atomic(path, save(stored, {key: json.dumps(value) for key, value in header.items()}), root=root)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and header of any safetensors file. The header's values are text. Raises SafetensorError or OSError."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)


def load_model(path: str | os.PathLike[str]) -> tuple[Segmenter, dict[str, Any]]:
    """Model, in evaluation mode on the CPU, and metadata. Loading is strict.

    The model of a deploy form has only the modules that this form keeps. Raises CheckpointError if the file is not such
    a checkpoint, is truncated or does not fit its own header, FileNotFoundError if it does not exist.
    """
    tensors, metadata = read_checkpoint(path)
    try:
        model = build_model(metadata["model"], len(metadata["classes"]), metadata["classifier"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if "deploy" in metadata:
        model.drop_training_only()
        tensors = {key: value.float() if value.dtype == torch.float16 else value for key, value in tensors.items()}
    load_strict(model, tensors, str(path))
    return model.eval(), metadata


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and parsed metadata of a checkpoint. Raises the same errors as `load_model`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        tensors, header = read_tensors(path)
        metadata = {key: json.loads(value) for key, value in header.items()} if "format" in header else {}
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as a safetensors checkpoint ({error})\n"
            "expected a file that `ssaseg train` or `ssaseg convert` wrote; is it truncated, or a .pth to convert?"
        ) from None
    if metadata.get("format") != FORMAT or not {"model", "classifier", "classes"} <= metadata.keys():
        raise CheckpointError(
            f"{path}: its header does not describe an ssaseg model (format {metadata.get('format')!r})\n"
            f"expected format {FORMAT!r}: convert official segmentation checkpoints with `ssaseg convert`;\n"
            "use a pre-trained backbone alone as model.pretrained of a recipe"
        )
    return tensors, {**DEFAULTS, **metadata}


def load_strict(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Loads a state dict. Raises CheckpointError naming the first key that is missing, unexpected or misshapen."""
    own = model.state_dict()
    missing = [key for key in own if key not in tensors]
    unexpected = [key for key in tensors if key not in own]
    shapes = [key for key in own if key in tensors and own[key].shape != tensors[key].shape]
    if not (missing or unexpected or shapes):
        model.load_state_dict(dict(tensors))
        return
    if shapes:
        key = shapes[0]
        detail = f"{key} is {tuple(tensors[key].shape)}, expected {tuple(own[key].shape)}"
    else:
        detail = f"first: {(missing + unexpected)[0]}"
    raise CheckpointError(
        f"{source}: does not fit the model: {len(missing)} keys missing, {len(unexpected)} unexpected, "
        f"{len(shapes)} of another shape\n{detail}"
    )
