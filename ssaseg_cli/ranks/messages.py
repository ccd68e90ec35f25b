"""Values that ranks send to one another, as bytes: JSON and tensors. To read them runs no code, unlike a pickle."""

import json
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from ssaseg.cli.errors import CommandError


def pack(value: Any) -> Tensor:
    """`value` as uint8 (N,) on the CPU.

    It may be made of None, bool, int, float, str, list, tuple, dict (with any such key), tensors and NumPy arrays of
    numbers, which arrive as tensors. Raises TypeError for anything else.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_outline(value, tensors))
    return torch.frombuffer(bytearray(save(tensors, {"value": text})), dtype=torch.uint8)


def unpack(message: Tensor) -> Any:
    """The value that `pack` was given; tensors are on the CPU. Raises CommandError for other bytes."""
    content = message.numpy().tobytes()
    size = int.from_bytes(content[:8], "little")
    try:
        outline = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["value"])
        return _value(outline, load(content))
    except Exception as error:  # safetensors and JSON raise several types
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise CommandError(
            f"a message from another rank cannot be read ({reason})\n"
            "all ranks must run the same version of ssaseg, and no other process may reach the port where they meet"
        ) from None


def _outline(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON: containers as [kind, content], tensors by their key in `tensors`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # of memory of its own
        return ["tensor", key]
    if isinstance(value, dict):
        return ["dict", [[_outline(key, tensors), _outline(each, tensors)] for key, each in value.items()]]
    if isinstance(value, list | tuple):
        return [type(value).__name__, [_outline(each, tensors) for each in value]]
    raise TypeError(f"ranks cannot send a value of type {type(value).__name__}")


def _value(outline: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(outline, list):
        return outline
    kind, content = outline
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_value(key, tensors): _value(each, tensors) for key, each in content}
    return {"list": list, "tuple": tuple}[kind](_value(each, tensors) for each in content)
