"""Opens files that hold a network, and makes the engine that runs it.

A checkpoint of ours or of others becomes a network in PyTorch; a graph, such as an .onnx, runs in its own runtime. A
checkpoint can run in another runtime too: it is exported once, see `exports`.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ssaseg.cli.device import select_device
from ssaseg.cli.engine.exports import cached_export, choose_backend
from ssaseg.cli.engine.graphs import KINDS, RUN_WITH, Graph, GraphEngine, graph_engine, read_graph
from ssaseg.cli.engine.stated import stated_metadata
from ssaseg.cli.errors import CommandError
from ssaseg.cli.options import run_checkpoint
from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.engines import PRECISIONS, Engine, TorchEngine
from ssaseg.cli.scoring.inference import Inference
from ssaseg.cli.weights import openvino_files
from ssaseg.cli.weights.classes import warn_of_untrained
from ssaseg.cli.weights.export import require_packages
from ssaseg.cli.weights.foreign import OURS, read_weights
from ssaseg.cli.weights.opening import Given, open_official
from ssaseg.files.download import hash_file
from ssaseg.files.text import describe
from ssaseg.models import Segmenter, load_model
from ssaseg.models.checkpoint import complete_metadata, read_outline
from ssaseg.models.fast import has_bfloat16
from ssaseg.models.header import DEFAULTS, CheckpointError
from ssaseg.recipes import parse_protocol

STATED = {"classes": "--classes", "protocol": "--protocol"}  # what a file must say, or the user


class Opened(NamedTuple):
    """A file that holds a network, with all that labelling images needs."""

    path: Path
    kind: str  # "torch", or of a graph "onnx", "pt2" or "openvino"
    model: Segmenter | None  # None: a graph
    metadata: dict[str, Any]  # as `load_model` returns it; `model` and `classifier` of a foreign graph are "unknown"
    graph: Graph | None = None


# ---- opening -----------------------------------------------------------------------------------------------------


def open_file(path: Path, classes: str | None = None, protocol: str | None = None) -> Opened:
    """Reads a checkpoint of ours, that of a run folder, official weights, a folder of transformers, or a graph: .onnx,
    .pt2, .xml.

    classes, protocol: what the file does not say itself, see `stated_metadata`. Official weights are matched as by
    `ssaseg convert`, in memory; a line on stderr says what matched. Raises CommandError and CheckpointError for a file
    that cannot be read, that holds no whole network, or that says itself what is given; OSError. Classes that were
    never trained are reported on stderr.
    """
    stated, path = stated_metadata(classes, protocol), run_checkpoint(path)
    suffix = path.suffix.lower()
    if suffix in KINDS and not path.is_dir():
        return _open_graph(path, KINDS[suffix], stated)
    if suffix == ".safetensors" and not path.is_dir() and read_outline(path)[1].get("format", "").startswith(OURS):
        _require_unstated(path, stated)
        model, metadata = load_model(path)
        warn_of_untrained(path, metadata)
        return Opened(path, "torch", model, metadata)
    return _open_official(path, stated)


def _open_official(path: Path, stated: Mapping[str, Any]) -> Opened:
    weights = read_weights(path)
    if weights.is_backbone:
        raise CommandError(
            f"{path}: holds only a backbone, without a classifier: it cannot label images\n"
            "use it as model.pretrained of a recipe"
        )
    lines: list[str] = []
    try:
        loaded = open_official(path, weights, Given(metadata=stated, option="--classes"), lines.append)
    except CommandError as error:
        first, *others = str(error).split("\n")
        if not others or not any(option in others[-1] for option in ("--model", "--classifier", "--allow-partial")):
            raise
        fix = f"convert it first, with an option: ssaseg convert {path} OURS.safetensors; {others[-1]}"
        raise CommandError("\n".join([first, *others[:-1], fix])) from None
    (heading, matched, *_), *rest = (line.splitlines() for line in lines)
    echo(f"{heading}:{matched.partition(';')[0].replace('matched', '').strip():>1} tensors matched", err=True)
    if rest:
        echo("; ".join(" ".join(said[0].split()) for said in rest), err=True)
    assert loaded.network is not None
    network = loaded.network.eval()
    return Opened(path, "torch", network, complete_metadata(network, loaded.metadata))


def _open_graph(path: Path, kind: str, stated: Mapping[str, Any]) -> Opened:
    graph, metadata = read_graph(path, kind)
    if metadata:
        _require_unstated(path, stated)
        if not {"model", "classifier", "classes", "protocol"} <= metadata.keys():
            raise CheckpointError(f"{path}: its metadata are not complete\nexport it again with `ssaseg convert`")
    elif not stated.keys() >= STATED.keys():
        missing = " and ".join(option for key, option in STATED.items() if key not in stated)
        raise CommandError(
            f"{path}: has no metadata of ssaseg: its classes and preprocessing are not known; give {missing}\n"
            "--classes: a data set, a recipe, a file of names, or A,B,...\n"
            "--protocol: a recipe with the test section, data.mean and data.std of this network"
        )
    else:
        metadata = {"model": "unknown", "classifier": "unknown", **stated}
    metadata = {**DEFAULTS, **metadata} | ({} if graph.channels == 3 else {"channels": graph.channels})
    for key in ("mean", "std"):
        if len(metadata[key]) != graph.channels:
            raise CommandError(f"{path}: takes {graph.channels} channels, but {key} has {len(metadata[key])} numbers")
    names = len(metadata["classes"])
    if graph.classes not in (None, names):
        raise CommandError(f"{path}: gives logits of {graph.classes} classes, but {names} have names\ngive all of them")
    warn_of_untrained(path, metadata)
    return Opened(path, kind, None, metadata, graph)


def _require_unstated(path: Path, stated: Mapping[str, Any]) -> None:
    if stated:
        option = STATED["classes" if "classes" in stated else "protocol"]
        raise CommandError(f"{path}: says its classes and protocol itself\nleave out {option}")


# ---- engines -----------------------------------------------------------------------------------------------------


def checkpoint_sum(path: Path) -> str:
    """SHA-256 of a file, or of the sums of the files in a folder. Raises OSError."""
    if not path.is_dir():
        return hash_file(path)
    sums = [hash_file(file) for file in sorted(path.iterdir()) if file.is_file()]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def device_for(opened: Opened, name: str) -> torch.device:
    """The device of `--device` for this file. Raises CommandError for a GPU where its runtime only knows the CPU."""
    if opened.kind not in ("onnx", "openvino"):
        return select_device(name)
    if name == "cuda":
        raise CommandError(
            f"--device cuda: {opened.path} runs on the CPU\nuse --device cpu, or the checkpoint that it is from"
        )
    return select_device("cpu")


def make_engine(
    opened: Opened,
    device: torch.device,
    precision: str = "float32",
    backend: str = "auto",
    exact: bool = False,
    pixels: int = 0,
) -> Engine:
    """The engine that labels images. exact: the arithmetic of training, bit for bit, in float32.

    backend: "auto" is a graph's own runtime; of a checkpoint PyTorch, or a faster runtime if that pays back, see
    `choose_backend`; it has no coarse logits. pixels: of all images of the run together, as the network gets them.
    Raises CommandError for a precision in which the device does not compute, and for a back end that cannot run this
    file or is not installed.
    """
    if opened.model is None:
        return _graph_engine(opened, device, precision, backend, exact)
    chosen = backend
    if backend == "auto":
        chosen = "torch" if exact else choose_backend(opened.model, device, pixels, precision)
    if chosen != "torch" and (exact or device.type != "cpu"):
        option = "--exact" if exact else f"--device {device.type}"
        raise CommandError(f"--backend {chosen}: not with {option}\nleave one of them out")
    path = None
    if chosen != "torch":
        try:
            path = cached_export(opened.path, opened.model, opened.metadata, chosen)
        except (CommandError, OSError) as error:
            if backend != "auto":
                raise
            echo(f"torch is used, as there is no export: {describe(error).partition(chr(10))[0]}", err=True)
    if path is None:
        require_precision(precision, device)
        return TorchEngine.of(opened.model, device, PRECISIONS[precision], exact)
    graph, _ = read_graph(path, "onnx")
    return _graph_engine(Opened(opened.path, "onnx", None, opened.metadata, graph), device, precision, chosen, False)


def own_inference(opened: Opened, engine: Engine, changes: Mapping[str, Any] = MappingProxyType({})) -> Inference:
    """Labels images with the file's own test protocol, mean and std; changes: keys of the protocol to change."""
    metadata = opened.metadata
    protocol = parse_protocol(metadata["protocol"] | dict(changes), f"{opened.path}: protocol")
    return Inference(engine, protocol, metadata["mean"], metadata["std"])


def _graph_engine(opened: Opened, device: torch.device, precision: str, backend: str, exact: bool) -> GraphEngine:
    """The engine of a graph. An .onnx also runs in OpenVINO."""
    runtimes = {"onnx": ("onnxruntime", "openvino"), "openvino": ("openvino",), "pt2": ("torch",)}[opened.kind]
    backend = runtimes[0] if backend == "auto" else backend
    assert opened.graph is not None
    if exact:
        raise CommandError(f"--exact: {opened.path} is an export\nleave it out, or give the checkpoint")
    if backend not in runtimes:
        fix = f"leave it out, or use {' or '.join(runtimes)}"
        raise CommandError(f"--backend {backend}: cannot run {opened.path}\n{fix}")
    openvino = backend == "openvino"
    require_packages(opened.path, RUN_WITH["openvino"] if openvino else ())
    able = {each: each == "float32" or (openvino and openvino_files.computes_in(each)) for each in PRECISIONS}
    _require_able(precision, able, f"{backend} on this CPU, with {opened.path.name},")
    return graph_engine(opened.path, opened.graph, backend, len(opened.metadata["classes"]), precision, device)


def require_precision(precision: str, device: torch.device) -> None:
    """Raises CommandError for a precision in which PyTorch does not compute on the device."""
    able = {"float32": True, "bf16": has_bfloat16(device), "fp16": device.type == "cuda"}
    _require_able(precision, able, f"this device ({device.type})")


def _require_able(precision: str, able: Mapping[str, bool], what: str) -> None:
    if not able[precision]:
        known = ", ".join(name for name, can in able.items() if can)
        raise CommandError(f"--precision {precision}: {what} does not compute in it\nuse one of: auto, {known}")
