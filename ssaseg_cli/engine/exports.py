"""Checkpoints as graphs for faster runtimes: when that pays back, and the folder in which exports are kept.

The folder is SSASEG_CACHE, or `ssaseg` in XDG_CACHE_HOME, or ~/.cache/ssaseg; there, `exports`. Any file in it may be
deleted. An export's name has a sum of the weights and of the versions of what made it, so that it never is another's.
"""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.weights import openvino_files
from ssaseg.cli.weights.export import NEEDED, Form, make_export, require_packages
from ssaseg.files.machine import cache_folder
from ssaseg.files.writing import write_atomic
from ssaseg.models import Segmenter
from ssaseg.models.masks.base import MASKS

# Packages that each back end needs for a checkpoint.
NEEDS = {"onnxruntime": NEEDED[".onnx"], "openvino": (*NEEDED[".onnx"], "openvino")}

# Pixels of all images of a run from which an export, which takes up to a minute or two, pays back; or the loading of
# one that is already there. The other runtimes save about 0.1 µs a pixel of a small network.
LONG, LONG_IF_THERE = 10**9, 5 * 10**7


def choose_backend(model: Segmenter, device: torch.device, pixels: int, precision: str = "float32") -> str:
    """The back end of "auto" for a checkpoint: another than "torch" if its packages are there and the run is long.

    It is OpenVINO on a CPU with units for bfloat16, and else ONNX Runtime, which was measured to be faster there; it
    knows float32 only.
    """
    if device.type != "cpu" or model.classifier_name == MASKS or pixels < LONG_IF_THERE:
        return "torch"
    able = {name for name, packages in NEEDS.items() if all(find_spec(each) for each in packages)}
    if "openvino" in able and openvino_files.computes_in("bf16") and openvino_files.computes_in(precision):
        chosen = "openvino"
    elif "onnxruntime" in able and precision == "float32":
        chosen = "onnxruntime"
    else:
        return "torch"
    return chosen if pixels >= LONG or _is_exported(model) else "torch"


def _is_exported(model: Segmenter) -> bool:
    try:
        return export_path(model).exists()
    except OSError:  # no home folder: said where an export is to be made
        return False


def export_path(model: Segmenter) -> Path:
    """Where the export of a network is, or would be."""
    code = hashlib.sha256()
    for each in (model.name, model.classifier_name, str(model.options), *map(version, ("ssaseg", "torch", "onnx"))):
        code.update(f"{each}\n".encode())
    for key, value in model.state_dict().items():
        code.update(f"{key} {tuple(value.shape)}\n".encode())
        code.update(value.cpu().contiguous().numpy().tobytes())
    return cache_folder() / "exports" / f"{model.name}-{model.classifier_name}-{code.hexdigest()[:24]}.onnx"


def cached_export(source: Path, model: Segmenter, metadata: Mapping[str, Any], backend: str) -> Path:
    """The export of a checkpoint for a back end; it is made if it is not there. Lines on stderr say so.

    Raises CommandError if packages are missing, for a mask method, and what `make_export` raises.
    """
    if model.classifier_name == MASKS:
        raise CommandError(f"--backend {backend}: {model.name} is a mask method, which only torch runs\nleave it out")
    require_packages(source, NEEDS[backend])
    path = export_path(model)
    if path.exists():
        return path
    echo(f"exporting {source} for {backend}; this takes up to a few minutes, once", err=True)
    made = make_export(source, path, model, metadata, Form(), lambda line: None)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(path, made.content)
    total = sum(each.stat().st_size for each in path.parent.glob("*.onnx"))
    echo(f"kept {path}: {len(made.content) / 2**20:.1f} MiB, all exports {total / 2**20:.1f} MiB", err=True)
    echo(f"to delete them: rm -r {path.parent}", err=True)
    return path
