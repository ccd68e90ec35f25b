"""Checkpoints: one safetensors file each. Its header is enough to rebuild the model, its classes and preprocessing."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ssaseg.files.reading import open_file
from ssaseg.files.structured import parse_json
from ssaseg.files.text import KEPT, printable
from ssaseg.files.writing import write_atomic
from ssaseg.models.build import build_model, build_outline
from ssaseg.models.header import DEFAULTS, FORMAT, CheckpointError, described, parse_header
from ssaseg.models.segmenter import Segmenter, is_below

LARGEST_HEADER = 2**22  # bytes; of 1,600 tensors it has about 200,000

FLOATS, INTEGERS = ("F64", "F32", "F16", "BF16"), ("I64", "I32", "I16", "I8", "U8", "BOOL")  # names in safetensors

SIZES = {  # of types of tensors, in bytes
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}

Outline = dict[str, tuple[str, tuple[int, ...]]]  # of the tensors of a file: key → (name of the type, shape)


def save_model(
    path: str | os.PathLike[str], model: Segmenter, metadata: Mapping[str, Any], root: Path | None = None
) -> None:
    """Writes the state dict, without a memory of pixels, and `metadata` (JSON values) as safetensors, atomically.

    `format`, `model`, `classifier`, its `options`, and `channels` other than 3 come from the model, other missing keys
    from `DEFAULTS`. If `classes` is missing, the classes are numbered. `root`: see `write_atomic`. An existing file
    stays until the new one is complete on the disk. Raises ValueError if `classes`, `mean` or `std` does not fit the
    model, OSError if the file cannot be written.
    """
    known = complete_metadata(model, metadata)
    memory = model.memory()
    kept = {key: value for key, value in model.state_dict().items() if not is_below(key, memory)}
    write_tensors(Path(path), kept, known, root)


def complete_metadata(model: Segmenter, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the header of a checkpoint says, see `save_model`, which raises the same ValueError."""
    known = {**DEFAULTS, "classes": numbered(model.num_classes), **_described(model, metadata)}
    if len(known["classes"]) != model.num_classes:
        raise ValueError(f"metadata names {len(known['classes'])} classes, the model has {model.num_classes}")
    for key in ("mean", "std"):
        if len(known[key]) != model.channels:
            raise ValueError(
                f"metadata has {len(known[key])} numbers as {key}, the model has {model.channels} channels"
            )
    return known


def _described(model: Segmenter, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`metadata` with what the header of every checkpoint says of its model."""
    found = {key: value for key, value in metadata.items() if key != "options"}
    found |= {"format": FORMAT, "model": model.name, "classifier": model.classifier_name}
    found |= {"options": model.options} if model.options else {}
    return found | ({"channels": model.channels} if model.channels != 3 else {})


def numbered(classes: int) -> list[str]:
    """Names for classes that have none."""
    return [f"class_{k}" for k in range(classes)]


def save_deploy(path: str | os.PathLike[str], model: Segmenter, metadata: Mapping[str, Any]) -> None:
    """Writes the deploy form: `deploy_tensors`, and `deploy` in the header. `load_model` reads this form too.

    Raises ValueError for a weight beyond float16's range, OSError if the file cannot be written.
    """
    deploy = {"weights": "float16", "without": model.training_only()}
    write_tensors(Path(path), deploy_tensors(model), {**DEFAULTS, **_described(model, metadata), "deploy": deploy})


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


def read_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of any safetensors file, of which `read_outline` has been read. Raises CheckpointError or OSError."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise _unreadable(path, error) from None


def read_outline(path: str | os.PathLike[str]) -> tuple[Outline, dict[str, str]]:
    """Types and shapes of the tensors in any safetensors file, and its header as text; no tensor is read.

    Raises CheckpointError if it is not such a file, FileNotFoundError if there is none, OSError if it is not a regular
    file.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        try:
            if length > LARGEST_HEADER:
                raise ValueError(f"its header would have {length} bytes, more than {LARGEST_HEADER}")
            head = parse_json(file.read(length))
            metadata = head.pop("__metadata__", None) or {}
            outline = {key: (each["dtype"], tuple(each["shape"])) for key, each in head.items()}
            ends = [each["data_offsets"][1] for each in head.values()]
            # The library maps the file before it compares these.
            data = sum(SIZES[dtype] * math.prod(map(_side, shape)) for dtype, shape in outline.values())
            if size != 8 + length + data or max(ends, default=0) != data:
                raise ValueError(f"the file has {size} bytes, its header describes {8 + length + data}")
            if not all(isinstance(text, str) for text in metadata.values()):
                raise ValueError("a value of its metadata is not a text")
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise _unreadable(path, error) from None
    return outline, metadata


def _side(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**48:
        raise ValueError("a side of a shape is not a size")
    return value


def _unreadable(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be read as a safetensors checkpoint ({printable(str(error)[:200])})\n"
        "expected a file that `ssaseg train` or `ssaseg convert` wrote; is it truncated, or a .pth to convert?"
    )


def load_model(path: str | os.PathLike[str]) -> tuple[Segmenter, dict[str, Any]]:
    """Model, in evaluation mode on the CPU, and metadata. Loading is strict.

    The model has no memory of pixels, see `Classifier.MEMORY`, so a classifier that needs one can't be trained further
    with it. That of a deploy form has only the modules that this form keeps. Names, types and shapes of the tensors are
    compared before they are read: memory depends on the network, not on the file. Raises CheckpointError if the file is
    not such a checkpoint, is truncated, does not fit its own header or has a value that is not finite,
    FileNotFoundError if it does not exist, OSError if it is not a regular file.
    """
    metadata, outline = read_header(path)
    names = metadata["model"], len(metadata["classes"]), metadata["classifier"]
    options, channels = metadata.get("options"), metadata.get("channels", 3)
    # Options decide about sizes: a network without memory is compared with the file first.
    builds: tuple[Callable[..., Segmenter], ...] = (build_outline, build_model) if options else (build_model,)
    for build in builds:
        try:
            with torch.device("cpu"):
                model = build(*names, options=options, memory=False, channels=channels)
        except ValueError as error:
            raise CheckpointError(f"{path}: {printable(str(error), KEPT)}") from None
        if "deploy" in metadata:
            model.drop_training_only()
        _require_fit(model, outline, str(path))
    tensors = read_tensors(path)
    require_finite(tensors, str(path))
    if "deploy" in metadata:
        tensors = {key: value.float() if value.dtype == torch.float16 else value for key, value in tensors.items()}
    model.load_state_dict(tensors)
    return model.eval(), metadata


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Outline]:
    """Metadata of a checkpoint, each value of the type and range that `header` states, and an outline of its tensors.

    Raises the same errors as `load_model`.
    """
    outline, header = read_outline(path)
    ours = header.get("format", "").startswith('"')  # plain text in files of other programs, such as "pt"
    metadata = parse_header(header, str(path)) if ours else {}
    if metadata.get("format") != FORMAT or not {"model", "classifier", "classes"} <= metadata.keys():
        raise CheckpointError(
            f"{path}: its header does not describe an ssaseg model (format {described(metadata.get('format'))})\n"
            f"expected format {FORMAT!r}: convert official segmentation checkpoints with `ssaseg convert`;\n"
            "use a pre-trained backbone alone as model.pretrained of a recipe"
        )
    return {**DEFAULTS, **metadata}, outline


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata of a checkpoint. Raises the same errors as `load_model`."""
    metadata, _ = read_header(path)
    return read_tensors(path), metadata


def require_finite(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Raises CheckpointError for the first tensor with NaN or infinity, also if only float32 cannot hold a value: it
    would make every prediction wrong.
    """
    for key, value in tensors.items():
        finite = (value.float() if value.dtype == torch.float64 else value).isfinite()
        wrong = int(value.numel() - finite.sum())
        if wrong:
            raise CheckpointError(
                f"{source}: {printable(key[:200])} has {wrong} of {value.numel()} values that are NaN or infinite\n"
                "expected finite weights; take a checkpoint from before the training went wrong"
            )


def load_strict(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Loads a state dict. Raises CheckpointError naming the first key that is missing, unexpected or misshapen."""
    kinds = {True: FLOATS[1], False: INTEGERS[0]}
    outline = {key: (kinds[value.is_floating_point()], tuple(value.shape)) for key, value in tensors.items()}
    _require_fit(model, outline, source)
    model.load_state_dict(dict(tensors))


def _require_fit(model: torch.nn.Module, outline: Outline, source: str) -> None:
    """Raises CheckpointError naming the first key that is missing, unexpected, misshapen or of another kind."""
    own = model.state_dict()
    missing = [key for key in own if key not in outline]
    unexpected = [key for key in outline if key not in own]
    shapes = [key for key in own if key in outline and tuple(own[key].shape) != outline[key][1]]
    kinds = [
        key
        for key, value in own.items()
        if key in outline and outline[key][0] not in (FLOATS if value.is_floating_point() else INTEGERS)
    ]
    if not (missing or unexpected or shapes or kinds):
        return
    if shapes:
        key = shapes[0]
        detail = f"{key} is {outline[key][1]}, expected {tuple(own[key].shape)}"
    elif kinds:
        detail = f"{kinds[0]} is of type {outline[kinds[0]][0]}, expected {own[kinds[0]].dtype}"
    else:
        detail = f"first: {printable((missing + unexpected)[0][:200])}"
    raise CheckpointError(
        f"{source}: does not fit the model: {len(missing)} keys missing, {len(unexpected)} unexpected, "
        f"{len(shapes)} of another shape\n{detail}"
    )
