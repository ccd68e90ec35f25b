"""Reads checkpoint files of any origin: finds the tensors in them, and whether they are ours. Runs no code in them.

`torch_files` reads the files of torch.save, `unwrapping` finds the weights in them. What is read is at most about as
large as the file, and every number that is read is a number of that file.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssaseg.cli.errors import CommandError
from ssaseg.cli.weights.huggingface import Stated, read_stated, weights_file
from ssaseg.cli.weights.stand_ins import Array, Inert, Refused, Unreadable
from ssaseg.cli.weights.torch_files import FLOAT8, LARGEST_FILE, LARGEST_WEIGHTS, Archive, Changed, open_archive
from ssaseg.cli.weights.unwrapping import find_weights, list_content, prefix_note, without_prefix
from ssaseg.files.reading import open_file
from ssaseg.files.text import printable
from ssaseg.models.build import CLASSIFIERS
from ssaseg.models.checkpoint import FLOATS, INTEGERS, read_outline, read_tensors, require_finite
from ssaseg.models.header import SCHEMA, parse_header
from ssaseg.models.official import NOT_USED, canonical, last_layer, layout_of, main_head, refusal

MOST_TENSORS = 20_000  # the largest network here has 1,600
LONGEST_KEY = 500  # characters

EIGHTHS = ("F8_E4M3", "F8_E5M2")  # names of float8 in safetensors

# Beginnings of keys of decoders and classifiers in official files; the last three are of mask methods.
HEADS = ("decode_head.", "pixel_decoder.", "sem_seg_head.", "yoso_head.")

OURS = '"ssaseg-'  # the beginning of our format, as a JSON text

# Names beside a tensor KEY of float8 that say that its values are to be multiplied.
SCALES = ("{key}_scale", "{key}_scale_inv", "{module}.scale", "{module}.scale_weight")

FIX = "load it elsewhere and save only its state dict with torch.save"


def count_rows(tensor: Tensor | None) -> int:
    """Length of the first dimension; 0 if there is none."""
    return tensor.shape[0] if tensor is not None and tensor.dim() else 0


@dataclass(frozen=True)
class Weights:
    """What a checkpoint file holds."""

    tensors: dict[str, Tensor]  # by official key, including `backbone.`; by our key if there is a `header`
    nesting: str  # the key under which they were found, for messages
    header: dict[str, Any] | None = None  # metadata of a file of ours
    meta: Mapping[str, Any] | None = None  # what an official file says about itself: classes, palette
    notes: tuple[str, ...] = ()  # phrases for the user: what was taken, what was changed
    layout: str = ""  # the program whose names the keys are; "": official names, or ours
    stated: Stated | None = None  # what a folder of transformers says about itself

    @property
    def is_backbone(self) -> bool:
        """Whether it has no decoder and no classifier, like an ImageNet checkpoint."""
        heads = (*HEADS, "classifier.") if self.header is None else ("classifier.", "decoder.")
        return not any(key.startswith(heads) for key in self.tensors)

    @property
    def classes_key(self) -> str:
        """Name of the main classifier's weight, which has one row for each class; a file need not have it."""
        if self.header is not None:
            kind = CLASSIFIERS.get(self.header.get("classifier", ""), CLASSIFIERS["linear"])
            return f"classifier.{kind.CLASS_ROWS[0]}"
        return f"{main_head(self.tensors, self.layout)}.{last_layer(self.tensors, self.layout)}.weight"

    @property
    def classifier(self) -> str:
        """The classifier that an official file has, by the tensors that only one has; else the plain one."""
        return next((name for name in CLASSIFIERS if self.mark(name) in self.tensors), "linear")

    def mark(self, classifier: str) -> str:
        """Name of a tensor that an official file has only with this classifier; "" if there is none."""
        mark = CLASSIFIERS[classifier].MARK if classifier in CLASSIFIERS else ""
        return f"{main_head(self.tensors)}.{mark}" if mark else ""


def read_weights(path: Path) -> Weights:
    """Reads a pickle (.pth, .pth.tar, zip or legacy) or a safetensors file, ours or official, or a transformers folder.

    Raises FileNotFoundError. Raises CommandError if the file is truncated, changed or too large, holds a type that is
    not known, has no weights, has a tensor that is not a dense block of numbers, has one tensor under two names with
    different values, or is of a variant that no network here can be. Raises CheckpointError for a header of ours that
    is not valid, and for values that are not finite.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    path = weights_file(path) if path.is_dir() else path
    weights = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_pickle(path)
    require_finite(weights.tensors, str(path))
    if weights.header is not None:
        return weights
    tensors = _official(path, weights.tensors)
    layout = layout_of(tensors)
    reason = refusal(tensors, layout)
    if reason:
        raise CommandError(f"{path}: {reason}")
    return _with_stated(path, replace(weights, tensors=tensors, layout=layout))


def _with_stated(path: Path, weights: Weights) -> Weights:
    """Adds what a folder of transformers says. Raises CommandError if it names another number of classes."""
    stated = read_stated(path)
    if stated is None:
        return weights
    if not weights.is_backbone and not stated.whole:
        raise CommandError(
            f"{path.parent}/config.json: architectures: got {stated.architecture}\n"
            f"expected a segmentation network, as the weights have a decoder\ncorrect config.json"
        )
    rows = count_rows(weights.tensors.get(weights.classes_key))
    if stated.classes is not None and len(stated.classes) != rows:
        raise CommandError(
            f"{path}: {weights.classes_key} has {rows} rows, id2label in config.json has {len(stated.classes)} names\n"
            "expected one name for each row"
        )
    return replace(weights, meta={"classes": stated.classes}, stated=stated)


def _read_safetensors(path: Path) -> Weights:
    outline, header = read_outline(path)
    # The header of other programs has plain text ("format": "pt"); ours has JSON values.
    metadata = parse_header(header, str(path)) if header.get("format", "").startswith(OURS) else None
    if path.stat().st_size > LARGEST_WEIGHTS:
        raise CommandError(
            f"{path}: larger than {LARGEST_WEIGHTS} bytes\nexpected the weights of one network of ssaseg"
        )
    for key, (dtype, _) in outline.items():
        if dtype not in (*FLOATS, *INTEGERS, *EIGHTHS):
            raise _odd(path, key, f"a tensor of type {dtype}")
    _require_names(path, outline)
    tensors = read_tensors(path)
    eighths = [key for key, value in tensors.items() if value.dtype in FLOAT8.values()]
    _require_unscaled(path, eighths, tensors)
    tensors |= {key: tensors[key].float() for key in eighths}
    if metadata is not None:
        return Weights(tensors, "top level", metadata, notes=_float8_note(eighths))
    tensors, prefix = without_prefix(tensors)
    return Weights(tensors, "top level", notes=(*prefix_note(prefix), *_float8_note(eighths)))


def _read_pickle(path: Path) -> Weights:
    with open_file(path, LARGEST_FILE) as file:
        archive = _open(path, file)
        found = find_weights(archive.content)
        if found is None:
            raise CommandError(
                f"{path}: no weights in it; its keys: {list_content(archive.content)}\n"
                "expected tensors under state_dict, model or another key, or at the top level"
            )
        _require_names(path, found.tensors)
        eighths = [key for key, value in found.tensors.items() if isinstance(value, Array) and value.dtype in FLOAT8]
        _require_unscaled(path, eighths, found.tensors)
        tensors: dict[str, Tensor] = {}
        total = 0
        for key, value in found.tensors.items():
            try:
                if isinstance(value, Inert):
                    raise Unreadable(value.kind)
                tensors[key] = archive.tensor(value)
            except Unreadable as error:
                raise _odd(path, key, str(error)) from None
            total += tensors[key].numel() * tensors[key].itemsize
            if total > LARGEST_WEIGHTS:
                raise _odd(path, key, f"with the tensors before it, more than {LARGEST_WEIGHTS} bytes of weights")
        meta = _stated(archive)
    return Weights(tensors, found.name, meta=meta, notes=(*found.notes, *_float8_note(eighths)))


def _open(path: Path, file: Any) -> Archive:
    try:
        return open_archive(file, os.fstat(file.fileno()).st_size)
    except OSError:
        raise
    except Refused as error:
        raise CommandError(
            f"{path}: holds a {printable(str(error))}, which is refused: to unpickle it could run code\n"
            f"nothing was run; if you trust the file, {FIX}"
        ) from None
    except Changed as error:
        raise CommandError(
            f"{path}: {printable(str(error)[:200])} in it has a wrong checksum: the file was changed or damaged\n"
            "copy or download it again"
        ) from None
    except Exception as error:  # a damaged pickle may lead to any of a dozen types
        reason = f" ({printable(str(error)[:200])})" if isinstance(error, Unreadable) else ""
        raise CommandError(
            f"{path}: is not a PyTorch checkpoint, or is truncated{reason}\n"
            "expected a whole file, written by torch.save"
        ) from None


def _odd(path: Path, key: str, reason: str) -> CommandError:
    return CommandError(
        f"{path}: {printable(key[:200])}: {printable(reason)}\n"
        "expected a dense tensor of floating-point numbers or integers, not larger than its storage\n" + FIX
    )


def _require_names(path: Path, tensors: Mapping[str, Any]) -> None:
    """Raises CommandError for more tensors than a network has, and for keys of a length that no key has."""
    if len(tensors) > MOST_TENSORS or any(len(key) > LONGEST_KEY for key in tensors):
        raise CommandError(
            f"{path}: {len(tensors)} tensors, with keys of up to {max(map(len, tensors))} characters\n"
            f"expected at most {MOST_TENSORS}, and {LONGEST_KEY} characters"
        )


def _require_unscaled(path: Path, eighths: list[str], tensors: Mapping[str, Any]) -> None:
    """Raises CommandError for float8 values that are to be multiplied: how differs from program to program."""
    for key in eighths:
        module = key.rpartition(".")[0]
        scale = next((name for each in SCALES if (name := each.format(key=key, module=module)) in tensors), None)
        if scale is not None:
            raise CommandError(
                f"{path}: {printable(key)} is float8 with a scale, {printable(scale)}\n"
                "expected plain float8: multiply by the scales elsewhere and save float16 or float32"
            )


def _float8_note(keys: list[str]) -> tuple[str, ...]:
    return (f"{len(keys)} of float8 read as float32",) if keys else ()


def _stated(archive: Archive) -> dict[str, Any]:
    """Classes and palette that an official file states, or None. mmsegmentation 1.x has them one level deeper."""
    meta = archive.content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    inner = meta.get("dataset_meta")
    names = ("classes", "palette") if isinstance(inner, Mapping) else ("CLASSES", "PALETTE")
    classes, palette = ((inner if isinstance(inner, Mapping) else meta).get(name) for name in names)
    if isinstance(palette, Array):
        try:
            palette = archive.tensor(palette).tolist()
        except Unreadable:
            palette = None
    fits, _ = SCHEMA["classes"]
    listed = list(classes) if isinstance(classes, list | tuple) else None
    return {"classes": listed if fits(listed) else None, "palette": palette}


def _official(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names of `ssaseg.models.official`, each tensor once."""
    if not any(key.startswith(("backbone.", *HEADS)) for key in tensors):
        # An ImageNet checkpoint is only a backbone.
        other = tuple(NOT_USED)
        tensors = {key if key.startswith(other) else f"backbone.{key}": value for key, value in tensors.items()}
    first: dict[str, str] = {}
    for key, value in tensors.items():
        same = tensors[first.setdefault(canonical(key), key)]
        if same is not value and (same.dtype != value.dtype or not torch.equal(same, value)):
            raise CommandError(
                f"{path}: {printable(first[canonical(key)])} and {printable(key)} differ\n"
                "expected equal values: the official code saves one tensor under both names"
            )
    return {name: tensors[key] for name, key in first.items()}
