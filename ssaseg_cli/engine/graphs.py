"""Files that hold a graph for another runtime: what they say about themselves, and the engines that run them.

A graph from elsewhere may be anything: before it is run, its input must be images and its output logits. Runtimes get
the content of a file, never its path, so that they open no other file.

A runtime uses as many threads for an image as PyTorch would in the thread that calls it (`torch.get_num_threads`): what
divides the cores among lanes divides them for every engine.
"""

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssaseg.cli.engine.pt2 import End, read_pt2
from ssaseg.cli.errors import CommandError
from ssaseg.cli.scoring.engines import Logits
from ssaseg.cli.weights import openvino_files
from ssaseg.cli.weights.export import FORMAT, require_packages
from ssaseg.datasets import DataError
from ssaseg.files.reading import read_file
from ssaseg.files.text import printable
from ssaseg.models.header import SCHEMA, parse_header

LARGEST = 2**31  # bytes of a file: the most that ONNX's format can hold
CPU = torch.device("cpu")

# Kind of a file by its suffix, and the packages that open and run it.
KINDS = {".onnx": "onnx", ".pt2": "pt2", ".xml": "openvino"}
RUN_WITH = {"onnx": ("onnx", "onnxruntime"), "pt2": (), "openvino": ("openvino",)}

TAKES = {"float32": "normalized", "f32": "normalized", "uint8": "rgb", "u8": "rgb"}  # by the type of the input

Ends = tuple[list[End], list[End]]  # inputs and outputs of a graph


class Graph(NamedTuple):
    """A file's graph, which takes images and gives logits."""

    content: Any  # bytes of ONNX, OpenVINO's model, or a program of `pt2`
    takes: str  # "normalized": float32, or "rgb": uint8
    channels: int
    batch: int | None  # the only number of images that it takes; None: any
    size: tuple[int, int] | None  # the only height and width; None: any of at least `smallest`
    smallest: tuple[int, int]
    classes: int | None  # of its logits; None: it does not say


# ---- reading -----------------------------------------------------------------------------------------------------


def read_graph(path: Path, kind: str) -> tuple[Graph, dict[str, Any]]:
    """The graph in a file, and the metadata that `ssaseg convert` has written; without these, nothing.

    Raises OSError if the file cannot be read, CheckpointError for metadata with a wrong value, and CommandError if
    packages are missing, if it is damaged, or if it is not a graph from images to logits.
    """
    require_packages(path, RUN_WITH[kind])
    beside = path.with_suffix(".bin")
    if kind == "openvino" and not beside.exists():
        raise CommandError(f"{path}: its weights, {printable(beside.name)}, are not beside it\ncopy both files")
    content = read_file(path, LARGEST)
    weights = read_file(beside, LARGEST) if kind == "openvino" else b""
    try:
        if kind == "openvino":
            made, ends, header = _openvino_parts(content, weights)
        else:
            made, ends, header = _onnx_parts(content) if kind == "onnx" else read_pt2(content)
    except Exception as error:  # parsers raise many types
        raise _damaged(path, kind, error) from None
    ours = header.get("format") == json.dumps(FORMAT)
    metadata = parse_header({key: header[key] for key in SCHEMA if key in header}, str(path)) if ours else {}
    return graph_of(path, made, ends, metadata), metadata


def _openvino_parts(content: bytes, weights: bytes) -> tuple[Any, Ends, dict[str, str]]:
    graph = openvino_files.read_graph(content, weights)
    ends = [
        [(each.element_type.get_type_name(), _openvino_shape(each)) for each in values]
        for values in (graph.inputs, graph.outputs)
    ]
    return graph, (ends[0], ends[1]), openvino_files.read_header(graph)


def _openvino_shape(end: Any) -> tuple[int | None, ...]:
    if end.partial_shape.rank.is_dynamic:
        return ()
    return tuple(None if each.is_dynamic else each.get_length() for each in end.partial_shape)


def _onnx_parts(content: bytes) -> tuple[bytes, Ends, dict[str, str]]:
    onnx = import_module("onnx")
    proto = onnx.load_model_from_string(content)
    if b"location" in content and _has_external_data(onnx, proto.graph, proto.functions):
        raise ValueError("its weights are in other files, which are not opened; save it as one file")
    inside = {each.name for each in proto.graph.initializer}  # old files list weights as inputs, too
    ends = [
        [_onnx_end(onnx, each) for each in values if each.name not in inside]
        for values in (proto.graph.input, proto.graph.output)
    ]
    return content, (ends[0], ends[1]), {each.key: each.value for each in proto.metadata_props}


def _onnx_end(onnx: Any, value: Any) -> End:
    kind = value.type.tensor_type
    name = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
    shape = tuple(each.dim_value if each.HasField("dim_value") else None for each in kind.shape.dim)
    return {"float": "float32"}.get(name, name), shape


def _has_external_data(onnx: Any, graph: Any, functions: Any = ()) -> bool:
    """Whether a tensor of a graph, of a graph in it, or of a function is in another file."""
    tensors = [*graph.initializer, *(each.values for each in graph.sparse_initializer)]
    for node in [*graph.node, *(node for function in functions for node in function.node)]:
        for attribute in node.attribute:
            tensors += [attribute.t, *attribute.tensors]
            if any(_has_external_data(onnx, each) for each in (attribute.g, *attribute.graphs) if each.node):
                return True
    return any(each.external_data or each.data_location == onnx.TensorProto.EXTERNAL for each in tensors)


def _damaged(path: Path, kind: str, error: Exception) -> CommandError:
    reason = printable(str(error).strip().partition("\n")[0][:200]) or type(error).__name__
    names = {"onnx": "an ONNX file", "pt2": "a .pt2 of ssaseg", "openvino": "a file of OpenVINO"}
    return CommandError(f"{path}: cannot be read as {names[kind]}\n{reason}\nif it should be one, copy it again")


def graph_of(path: Path, content: Any, ends: Ends, metadata: Mapping[str, Any]) -> Graph:
    """What a graph takes and gives. Raises CommandError unless it maps images to logits."""
    inputs, outputs = ends
    if len(inputs) != 1 or len(inputs[0][1]) != 4 or inputs[0][0] not in TAKES or inputs[0][1][1] not in range(1, 17):
        raise CommandError(
            f"{path}: takes {_shown(inputs)}\nexpected one input, images (N,C,H,W), float32 or uint8, with a fixed C"
        )
    labels = metadata.get("output") == "labels" or (len(outputs) == 1 and outputs[0][0] not in ("float32", "f32"))
    if labels:
        raise CommandError(
            f"{path}: gives labels, at the size of its input, but the protocol's resizing needs logits\n"
            "export it again with --output logits"
        )
    if len(outputs) != 1 or len(outputs[0][1]) != 4:
        raise CommandError(f"{path}: gives {_shown(outputs)}\nexpected one output, logits (N,K,h,w), float32")
    (type_, (batch, channels, height, width)), (_, given) = inputs[0], outputs[0]
    assert channels is not None
    size = None if height is None or width is None else (height, width)
    height, width = metadata.get("smallest", (1, 1))
    return Graph(content, TAKES[type_], channels, batch, size, (height, width), given[1])


def _shown(ends: list[End]) -> str:
    """Inputs or outputs as text."""
    texts = [f"{type_} ({','.join('?' if n is None else str(n) for n in shape)})" for type_, shape in ends[:4]]
    return printable(", ".join(texts) + (" and more" if len(ends) > 4 else "")) or "nothing"


# ---- running -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GraphEngine:
    """A file's graph in its runtime. `run`: from images of the graph's type to logits, any threads at the same time."""

    path: Path
    what: str
    graph: Graph
    num_classes: int
    run: Callable[[Tensor], Tensor]
    device: torch.device = CPU
    has_coarse: bool = False
    gives_scores: bool = False

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.graph.channels

    @property
    def takes(self) -> str:
        """See `Engine`."""
        return self.graph.takes

    def logits(self, pixels: Tensor, coarse: bool = False) -> Logits:
        """Logits (N,K,·,·) of pixels (N,C,h,w). Raises DataError for a size that the graph does not take."""
        self._require_size(pixels)
        batch = self.graph.batch or len(pixels)
        found = []
        for images in pixels.split(batch):
            whole = torch.cat([images, images[:1].expand(batch - len(images), -1, -1, -1)])
            try:
                got = self.run(whole.contiguous())
            except Exception as error:  # each runtime has its own types
                reason = printable(str(error).strip().partition("\n")[0][:200])
                kind = MemoryError if "alloc" in reason else DataError
                raise kind(f"{self.path}: {self.what} cannot compute {_sides(pixels)}: {reason}") from error
            if got.dim() != 4 or got.shape[:2] != (batch, self.num_classes):
                raise CommandError(
                    f"{self.path}: gives {tuple(got.shape)} for {tuple(whole.shape)}\n"
                    f"expected logits of {self.num_classes} classes, ({batch},{self.num_classes},h,w)"
                )
            found.append(got[: len(images)].float())
        return Logits(found[0] if len(found) == 1 else torch.cat(found), None)

    def _require_size(self, pixels: Tensor) -> None:
        size, (height, width) = self.graph.size, self.graph.smallest
        if size is not None and tuple(pixels.shape[2:]) != size:
            raise DataError(
                f"{self.path}: takes only {size[0]} x {size[1]} pixels (height x width), got {_sides(pixels)}\n"
                "export it again without --size, or choose a protocol that makes inputs of this size"
            )
        if size is None and (pixels.shape[2] < height or pixels.shape[3] < width):
            raise DataError(f"{self.path}: takes at least {height} x {width} pixels, got {_sides(pixels)}")


def _sides(pixels: Tensor) -> str:
    return f"{pixels.shape[2]} x {pixels.shape[3]} as the network's input"


class PerThreads:
    """What a runtime needs for each number of threads, made at the first call from a thread that has so many."""

    def __init__(self, make: Callable[[int], Callable[[Tensor], Tensor]]) -> None:
        self.make, self.lock = make, threading.Lock()
        self.made: dict[int, Callable[[Tensor], Tensor]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """The graph's output."""
        return self.ready()(images)

    def ready(self) -> Callable[[Tensor], Tensor]:
        """The runner for this thread."""
        threads = torch.get_num_threads()
        with self.lock:
            if threads not in self.made:
                self.made[threads] = self.make(threads)
            return self.made[threads]


def onnx_runner(content: bytes, threads: int) -> Callable[[Tensor], Tensor]:
    """A function that computes an ONNX file's output with ONNX Runtime."""
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # do not print errors: they are also raised
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def graph_engine(path: Path, graph: Graph, backend: str, classes: int, precision: str, device: torch.device) -> Any:
    """The engine of a graph. backend: onnxruntime, openvino, or torch for a .pt2. CommandError if it does not run."""
    if backend == "torch":  # a .pt2
        return GraphEngine(path, "torch, .pt2, float32", graph, classes, graph.content.on(device), device)
    try:
        if backend == "openvino":
            content = graph.content
            made = openvino_files.read_graph(content) if isinstance(content, bytes) else content
            run = PerThreads(lambda n: openvino_files.SizedRunner(made, n, precision))
        else:
            run = PerThreads(lambda n: onnx_runner(graph.content, n))
        run.ready()
    except Exception as error:
        reason = printable(str(error).strip().partition("\n")[0][:200])
        raise CommandError(f"{path}: {backend} cannot run it\n{reason}") from None
    return GraphEngine(path, f"{backend}, {precision}", graph, classes, run)
