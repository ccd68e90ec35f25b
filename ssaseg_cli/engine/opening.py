"""Opens files that hold a network, and makes the engine that runs it."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from ssaseg.cli.errors import CommandError
from ssaseg.cli.scoring.engines import PRECISIONS, Engine, TorchEngine
from ssaseg.models import Segmenter, load_model
from ssaseg.models.fast import has_bfloat16


class Opened(NamedTuple):
    """A file that holds a network, with all that labelling images needs."""

    path: Path
    kind: str  # "torch"
    model: Segmenter | None  # None: another runtime runs the file
    metadata: dict[str, Any]  # as `load_model` returns it


def open_file(path: Path) -> Opened:
    """Reads a checkpoint. Raises what `load_model` raises."""
    model, metadata = load_model(path)
    return Opened(path, "torch", model, metadata)


def make_engine(
    opened: Opened,
    device: torch.device,
    precision: str = "float32",
    backend: str = "torch",
    exact: bool = False,
) -> Engine:
    """The engine that labels images. exact: the arithmetic of training, bit for bit, in float32.

    Raises CommandError for a precision in which the device does not compute.
    """
    assert opened.model is not None
    require_precision(precision, device)
    return TorchEngine.of(opened.model, device, PRECISIONS[precision], exact)


def require_precision(precision: str, device: torch.device) -> None:
    """Raises CommandError for a precision in which the device does not compute."""
    able = {"float32": True, "bf16": has_bfloat16(device), "fp16": device.type == "cuda"}
    if not able[precision]:
        known = ", ".join(name for name, can in able.items() if can)
        raise CommandError(
            f"--precision {precision}: this device ({device.type}) does not compute in it\nuse one of: auto, {known}"
        )
