"""Reads checkpoint files of any origin: finds the tensors in them, and whether they are ours. Runs no code in them.

Pickles are read with PyTorch's restricted reader. Real timm checkpoints hold an `argparse.Namespace` and NumPy numbers,
so these inert types are allowed. mmengine's checkpoints hold curves of their own type; they are replaced by an object
that does nothing. Any other type is refused by name and never constructed.
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
    """Length of the first dimension; 0 if there is none."""
    return tensor.shape[0] if tensor is not None and tensor.dim() else 0


# Keys under which training scripts keep the weights. The first that holds tensors is used: averaged weights come first.
NESTINGS = ("state_dict_ema", "state_dict", "model")

OURS = "ssaseg-"

# Booleans, numbers, text and dates; not objects or records, whose bytes could be anything.
INERT_DTYPES = "?bhilqBHILQefdgFDGSUMm"

TENSOR_TYPES = ("torch.", "collections.OrderedDict")  # types that every state dict is made of

# The type of mmengine's curves. Their pickles look up methods with `getattr`, which is replaced by `_nothing`.
CURVES = "mmengine.logging.history_buffer.HistoryBuffer"

PICKLES = 5  # of a legacy file: magic number, version, system, content, keys

MOST_OPCODES = 1_000_000  # how many are searched for the name of a type


@dataclass(frozen=True)
class Weights:
    """What a checkpoint file holds."""

    tensors: dict[str, Tensor]  # by official key, including `backbone.`; by our key if there is a `header`
    nesting: str  # the key under which they were found, for messages
    header: dict[str, Any] | None = None  # metadata of a file of ours
    meta: Mapping[str, Any] | None = None  # what an official file says about itself, such as its classes

    @property
    def is_backbone(self) -> bool:
        """Whether it has no decoder and no classifier, like an ImageNet checkpoint."""
        return not any(key.startswith(("decode_head.", "classifier.")) for key in self.tensors)


def read_weights(path: Path) -> Weights:
    """Reads a pickle (.pth, .pth.tar, zip or legacy) or a safetensors file, ours or official.

    Raises FileNotFoundError. Raises CommandError if the file is truncated, holds a type that is not allowed, has no
    tensors, has a value that is not finite, or has one tensor under two names with different values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    content, header = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else (_read_pickle(path), None)
    tensors, nesting = _unwrap(content)
    if not tensors:
        raise CommandError(f"{path}: has no tensors\nexpected some under {', '.join(NESTINGS)} or at the top level")
    require_finite(path, tensors)
    if header is not None:
        return Weights(tensors, nesting, header=header)
    meta = content.get("meta")
    return Weights(_official(path, tensors), nesting, meta=meta if isinstance(meta, Mapping) else None)


def require_finite(source: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises CommandError for the first tensor with NaN or infinity: it would make every prediction wrong."""
    for key, value in tensors.items():
        wrong = int(value.numel() - value.isfinite().sum())
        if wrong:
            raise CommandError(
                f"{source}: {key} has {wrong} of {value.numel()} values that are NaN or infinite\n"
                "expected finite weights; take a checkpoint from before the training went wrong"
            )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors, and the header if the file is one of ours."""
    try:
        tensors, header = read_tensors(path)
        # The header of other programs has plain text ("format": "pt"); ours has JSON values.
        ours = header.get("format", "").startswith(f'"{OURS}')
        return tensors, {key: json.loads(value) for key, value in header.items()} if ours else None
    except (SafetensorError, ValueError) as error:
        raise CommandError(
            f"{path}: cannot be read as safetensors ({error})\nit may be truncated: copy or download it again"
        ) from None


def _read_pickle(path: Path) -> Any:
    try:
        # PyTorch's warnings are about its own files, and ask to open issues there. They do not help the user.
        with warnings.catch_warnings(), torch.serialization.safe_globals(inert_types()):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may raise any of a dozen types
        refused = re.search(r"(?:GLOBAL |<class ')([\w.]+)", str(error))
        name = refused[1] if refused is not None else _foreign_type(path)
    if name is None:
        raise CommandError(
            f"{path}: is not a PyTorch checkpoint, or is truncated\n"
            "expected a whole file, written by torch.save with its default pickle protocol, 2"
        )
    raise CommandError(
        f"{path}: holds a {name}, which is refused: to unpickle it could run code\n"
        "nothing was run; if you trust the file, load it elsewhere and save only its state dict with torch.save"
    )


def inert_types() -> list[Any]:
    """What a pickle may construct in addition to tensors and plain containers: types whose construction runs no code.

    A pair is a type or function, and the name in a file that it replaces.
    """
    reconstruct, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    # NumPy 2 moved them. A file has the name that was valid when it was written.
    moved = [
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for function, name in ((reconstruct, "_reconstruct"), (scalar, "scalar"))
    ]
    dtypes = {type(np.dtype(code)) for code in INERT_DTYPES}
    stand_ins = [(_nothing, "builtins.getattr"), (argparse.Namespace, CURVES)]
    return [argparse.Namespace, np.dtype, np.ndarray, *dtypes, *moved, *stand_ins]


def _nothing(*_: Any) -> None:
    """Replaces `getattr`: for everything that a pickle looks up, it gets None."""


def _foreign_type(path: Path) -> str | None:
    """The first type that a plain pickle names and no state dict has; None if there is none. Reads only the opcodes.

    PyTorch stops at opcodes newer than protocol 2, before it reaches the types.
    """
    recent: list[str] = []  # STACK_GLOBAL takes module and name from the stack: the last two texts
    with path.open("rb") as file:
        pickles = (pickletools.genops(file) for _ in range(PICKLES))
        try:
            for opcode, argument, _ in itertools.islice(itertools.chain.from_iterable(pickles), MOST_OPCODES):
                if opcode.name in ("GLOBAL", "INST"):
                    recent = str(argument).split(" ")
                elif "UNICODE" in opcode.name:
                    recent = [*recent[-1:], str(argument)]
                if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL") and not ".".join(recent).startswith(TENSOR_TYPES):
                    return ".".join(recent)
        except Exception:  # the file is not a pickle, or its end is missing
            return None
    return None


def _unwrap(content: Any) -> tuple[dict[str, Tensor], str]:
    """The state dict, and where it was found: the first of `NESTINGS` that holds tensors, or the top level."""
    if not isinstance(content, Mapping):
        return {}, ""
    for nesting in NESTINGS:
        tensors = _tensors(content.get(nesting))
        if tensors:
            return tensors, nesting
    return _tensors(content), "top level"


def _tensors(state: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, by key without the prefix `module.` of DistributedDataParallel."""
    if not isinstance(state, Mapping):
        return {}
    return {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}


def _official(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names of `ssaseg.models.official`, each tensor once."""
    if not any(key.startswith(("backbone.", "decode_head.")) for key in tensors):
        # An ImageNet checkpoint is only a backbone.
        other = tuple(NOT_USED)
        tensors = {key if key.startswith(other) else f"backbone.{key}": value for key, value in tensors.items()}
    first: dict[str, str] = {}
    for key, value in tensors.items():
        same = tensors[first.setdefault(canonical(key), key)]
        if same is not value and (same.dtype != value.dtype or not torch.equal(same, value)):
            raise CommandError(
                f"{path}: {first[canonical(key)]} and {key} differ\n"
                "expected equal values: the official code saves one tensor under both names"
            )
    return {name: tensors[key] for name, key in first.items()}
