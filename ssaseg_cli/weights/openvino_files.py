"""OpenVINO's files: an .xml with the graph, and a .bin of the same name beside it with the weights.

Our header is a text of JSON in the graph's `rt_info`, under HEADER. The package `openvino` is imported when it is used.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ssaseg.cli.device import count_cores
from ssaseg.files.reading import read_file

HEADER = "ssaseg"  # the key in rt_info

HINTS = {"float32": "f32", "bf16": "bf16", "fp16": "f16"}
# A graph is compiled for one size once REPEATS images of it have come, as that takes up to seconds; for SIZES sizes.
REPEATS, SIZES = 8, 4

CAPABILITIES = {"float32": "FP32", "bf16": "BF16", "fp16": "FP16"}


@cache
def core() -> Any:
    """OpenVINO's runtime; one for the process, as each loads its plugins."""
    return import_module("openvino").Core()


def from_onnx(content: bytes, header: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """The contents of .xml and .bin, with weights in float32, of an ONNX file's content."""
    openvino = import_module("openvino")
    graph = core().read_model(content)
    graph.set_rt_info(json.dumps(header), [HEADER])
    with TemporaryDirectory() as folder:
        path = Path(folder, "graph.xml")
        openvino.save_model(graph, path, compress_to_fp16=False)
        return read_file(path), read_file(path.with_suffix(".bin"))


def read_graph(content: bytes, weights: bytes = b"") -> Any:
    """OpenVINO's model of the contents of an .xml and its .bin, or of an ONNX file. Raises RuntimeError if damaged."""
    return core().read_model(content, weights) if weights else core().read_model(content)


def read_header(graph: Any) -> dict[str, str]:
    """Our header, JSON values by key; empty if the graph has none. Raises ValueError if it is not a JSON object."""
    if not graph.has_rt_info([HEADER]):
        return {}
    header = json.loads(graph.get_rt_info([HEADER]).astype(str))
    if not isinstance(header, dict):
        raise ValueError("its metadata is not a JSON object")
    return {key: json.dumps(value) for key, value in header.items()}


def computes_in(precision: str) -> bool:
    """Whether OpenVINO computes in this precision on this CPU."""
    return CAPABILITIES[precision] in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def compile_graph(graph: Any, threads: int | None = None, precision: str = "float32") -> Any:
    """The graph for this CPU. `threads`: of one image; the cores are divided among as many images at the same time."""
    cores = count_cores()
    threads = min(threads or cores, cores)
    images = max(cores // threads, 1)
    settings = {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "INFERENCE_NUM_THREADS": threads * images,
        "NUM_STREAMS": images,
    }
    return core().compile_model(graph, "CPU", settings)


def runner(compiled: Any) -> Callable[[Tensor], Tensor]:
    """A function that computes the first output of a compiled graph; several threads may call it."""
    own = threading.local()  # a request computes one thing at a time

    def run(images: Tensor) -> Tensor:
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        return torch.from_numpy(own.request.infer([images.numpy()])[0])

    return run


class SizedRunner:
    """Computes a graph's first output; several threads may call it.

    Code for any size is slow: for a size that comes again and again, the graph is compiled for it alone.
    """

    def __init__(self, graph: Any, threads: int | None = None, precision: str = "float32") -> None:
        self.graph, self.threads, self.precision = graph, threads, precision
        self.any_size = runner(compile_graph(graph, threads, precision))
        self.seen: Counter[tuple[int, ...]] = Counter()
        self.sized: dict[tuple[int, ...], Callable[[Tensor], Tensor]] = {}
        self.lock = threading.Lock()

    def __call__(self, images: Tensor) -> Tensor:
        """The graph's output for images (N,C,h,w)."""
        shape = tuple(images.shape)
        run = self.sized.get(shape)
        if run is None and len(self.sized) < SIZES:
            with self.lock:
                self.seen[shape] += 1
                if self.seen[shape] > REPEATS and shape not in self.sized and len(self.sized) < SIZES:
                    graph = self.graph.clone()
                    graph.reshape(list(shape))
                    self.sized[shape] = runner(compile_graph(graph, self.threads, self.precision))
                run = self.sized.get(shape)
        return (run or self.any_size)(images)
