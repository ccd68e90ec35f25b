"""Checkpoint files as they come: read without running anything in them, unwrapped, told apart.

Pickles go through PyTorch's restricted reader. Genuine timm checkpoints hold an `argparse.Namespace` and NumPy
numbers, so these inert types are let in; mmengine's hold curves of its own type, for which a stand-in is built that
does nothing. Any other type is refused by name and never constructed.
"""

import argparse
import itertools
import json
import pickletools
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from ssaseg.cli.errors import CommandError
from ssaseg.models.checkpoint import read_tensors
from ssaseg.models.official import NOT_USED, canonical


def count_rows(tensor: Tensor | None) -> int:
    """Length of the first dimension; 0 where there is none."""
    return tensor.shape[0] if tensor is not None and tensor.dim() else 0


# Where a training script keeps the weights; the first that holds tensors wins, so averaged weights before raw ones.
NESTINGS = ("state_dict_ema", "state_dict", "model")

OURS = "ssaseg-"

# Booleans, numbers, text and dates; not objects or records, whose bytes could be anything.
INERT_DTYPES = "?bhilqBHILQefdgFDGSUMm"

TENSOR_PARTS = ("torch.", "collections.OrderedDict")  # types that every state dict is made of

# Where mmengine's curves say they come from; they name methods of theirs by a `getattr`, which finds nothing here.
CURVES = "mmengine.logging.history_buffer.HistoryBuffer"

PICKLES = 5  # of a legacy file: magic number, version, system, content, keys

MOST_OPCODES = 1_000_000  # looked at for the name of a type


@dataclass(frozen=True)
class Weights:
    """What a checkpoint file holds."""

    tensors: dict[str, Tensor]  # by official key with its `backbone.`, or by our key where `header` says so
    nesting: str  # where they were found, for the report
    header: dict[str, Any] | None = None  # metadata of a file of ours
    meta: Mapping[str, Any] | None = None  # what an official file says about itself, such as its classes

    @property
    def is_backbone(self) -> bool:
        """Without decoder and classifier, as an ImageNet checkpoint."""
        return not any(key.startswith(("decode_head.", "classifier.")) for key in self.tensors)


def read_weights(path: Path) -> Weights:
    """Reads a pickle (.pth, .pth.tar, zip or legacy) or a safetensors file, ours or official.

    Raises CommandError where it is truncated, holds a type that is not let in, no tensors, a value that is not finite,
    or one tensor under two names with two values; FileNotFoundError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    content, header = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else (_read_pickle(path), None)
    tensors, nesting = _unwrap(content)
    if not tensors:
        raise CommandError(f"{path}: no tensors in it\nlooked under {', '.join(NESTINGS)} and at the top")
    require_finite(path, tensors)
    if header is not None:
        return Weights(tensors, nesting, header=header)
    meta = content.get("meta")
    return Weights(_official(path, tensors), nesting, meta=meta if isinstance(meta, Mapping) else None)


def require_finite(source: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises CommandError for the first tensor with NaN or infinity, which would spoil every prediction."""
    for key, value in tensors.items():
        wrong = int(value.numel() - value.isfinite().sum())
        if wrong:
            raise CommandError(
                f"{source}: {key} has {wrong} of {value.numel()} values that are NaN or infinite\n"
                "expected finite weights; take a checkpoint from before the training went wrong"
            )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors, and the header where the file is one of ours."""
    try:
        tensors, header = read_tensors(path)
        # Others write plain text there ("format": "pt"); ours are JSON values.
        ours = header.get("format", "").startswith(f'"{OURS}')
        return tensors, {key: json.loads(value) for key, value in header.items()} if ours else None
    except (SafetensorError, ValueError) as error:
        raise CommandError(f"{path}: cannot be read as safetensors ({error})\nis it truncated?") from None


def _read_pickle(path: Path) -> Any:
    try:
        # PyTorch's warnings tell of its own files and of issues to open there, not of what the user can do.
        with warnings.catch_warnings(), torch.serialization.safe_globals(inert_types()):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may end in any of a dozen types
        refused = re.search(r"(?:GLOBAL |<class ')([\w.]+)", str(error))
        name = refused[1] if refused is not None else _foreign_type(path)
    if name is None:
        raise CommandError(
            f"{path}: is not a PyTorch checkpoint, or is truncated\n"
            "expected a whole file as torch.save writes it, by its default pickle protocol, 2"
        )
    raise CommandError(
        f"{path}: holds a {name}, which is refused: unpickling it could run code\n"
        "nothing was executed; save the state dict alone with torch.save, where the file is trusted"
    )


def inert_types() -> list[Any]:
    """What a pickle may construct beside tensors and plain containers: types whose construction runs nothing.

    A pair is a type or function, and the name in a file that it stands for.
    """
    reconstruct, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    # NumPy 2 moved them, and files name the place where they were written.
    moved = [
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for function, name in ((reconstruct, "_reconstruct"), (scalar, "scalar"))
    ]
    dtypes = {type(np.dtype(code)) for code in INERT_DTYPES}
    stand_ins = [(_nothing, "builtins.getattr"), (argparse.Namespace, CURVES)]
    return [argparse.Namespace, np.dtype, np.ndarray, *dtypes, *moved, *stand_ins]


def _nothing(*_: Any) -> None:
    """Stands for `getattr`: whatever a pickle looks for, it gets None."""


def _foreign_type(path: Path) -> str | None:
    """The first type that a plain pickle names and no state dict has, by its opcodes alone; None where there is none.

    PyTorch gives up at opcodes newer than protocol 2, before it comes to the types.
    """
    recent: list[str] = []  # STACK_GLOBAL takes module and name from the stack: the last two texts
    with path.open("rb") as file:
        parts = (pickletools.genops(file) for _ in range(PICKLES))
        try:
            for opcode, argument, _ in itertools.islice(itertools.chain.from_iterable(parts), MOST_OPCODES):
                if opcode.name in ("GLOBAL", "INST"):
                    recent = str(argument).split(" ")
                elif "UNICODE" in opcode.name:
                    recent = [*recent[-1:], str(argument)]
                if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL") and not ".".join(recent).startswith(TENSOR_PARTS):
                    return ".".join(recent)
        except Exception:  # not a pickle, or its end is missing
            return None
    return None


def _unwrap(content: Any) -> tuple[dict[str, Tensor], str]:
    """The state dict, by the first of `NESTINGS` that holds tensors, or the content itself."""
    if not isinstance(content, Mapping):
        return {}, ""
    for nesting in NESTINGS:
        tensors = _tensors(content.get(nesting))
        if tensors:
            return tensors, nesting
    return _tensors(content), "top level"


def _tensors(state: Any) -> dict[str, Tensor]:
    """Its tensors, without the `module.` that DistributedDataParallel puts before every key."""
    if not isinstance(state, Mapping):
        return {}
    return {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}


def _official(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names of `ssaseg.models.official`, each tensor once."""
    if not any(key.startswith(("backbone.", "decode_head.")) for key in tensors):
        # An ImageNet checkpoint is a bare backbone.
        other = tuple(NOT_USED)
        tensors = {key if key.startswith(other) else f"backbone.{key}": value for key, value in tensors.items()}
    first: dict[str, str] = {}
    for key, value in tensors.items():
        twin = tensors[first.setdefault(canonical(key), key)]
        if twin is not value and (twin.dtype != value.dtype or not torch.equal(twin, value)):
            raise CommandError(
                f"{path}: {first[canonical(key)]} and {key} differ\n"
                "expected equal values: they are two names of one tensor, which the official code saves under both"
            )
    return {name: tensors[key] for name, key in first.items()}
