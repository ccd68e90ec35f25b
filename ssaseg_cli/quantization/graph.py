"""The float32 ONNX graph of a network, and int8 graphs made of it by ONNX Runtime's quantiser.

The graphs are in QDQ form: float32 nodes between pairs of QuantizeLinear and DequantizeLinear, which the runtime fuses
into int8 kernels. Weights are symmetric, one scale per output channel; activations are uint8, one scale per tensor.

Weights have 7 bits: on x86 processors without VNNI the kernels add two products uint8 · int8 in 16 bits, and clip the
sum without notice. 2 · 255 · 64 fits into them; 2 · 255 · 127 does not.

Two parts always stay float32. The layers that read the image: with three input channels ONNX Runtime's int8 kernel
is several times slower than its float32 one. And the classifier: its softmaxes, sums over all pixels and divisions by
norms have no int8 kernels, and it takes less than a tenth of the time.
"""

import io
import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

# Operators with int8 kernels. Not Softmax: its int8 kernel is no faster, and small probabilities become 0.
OPERATORS = (
    "Add", "AveragePool", "Clip", "Concat", "Conv", "ConvTranspose", "Gemm", "GlobalAveragePool", "MatMul", "MaxPool",
    "Mul", "Relu", "Reshape", "Resize", "Split", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip

CLASSIFIER = "classifier"

# What a graph's header says about the checkpoint, where exports of equal weights may differ.
OF_CHECKPOINT = ("classes", "palette", "mean", "std", "protocol", "range", "step", "recipe")

# How ranges are chosen: ONNX Runtime's name, and its options. Its percentiles are symmetric around 0 by default, which
# would waste half of uint8 behind a ReLU.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "minmax": ("MinMax", {}),
    "percentile": ("Percentile", {"percentile": 99.99, "symmetric": False}),
    "entropy": ("Entropy", {}),
}


class Once:
    """One network input, as ONNX Runtime's calibrators read it."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.left = [{"images": pixels}]

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The input; then None."""
        return self.left.pop() if self.left else None


class Graph:
    """A float32 graph with the layers that can be quantised; `measure_ranges` must be called before `quantized`.

    A layer is a convolution or product with weights, by the name of its weights, with what follows it up to the next.
    """

    def __init__(self, content: bytes, metadata: Mapping[str, Any]) -> None:
        """`content`: of an ONNX file of ssaseg; `metadata` replaces values of its header."""
        self.onnx = import_module("onnx")
        self.proto = self.onnx.load_from_string(content)
        written = {entry.key: entry.value for entry in self.proto.metadata_props}
        self.header = written | {key: json.dumps(metadata[key]) for key in OF_CHECKPOINT if key in metadata}
        self._bound_gates()
        self.layer_of = self._find_layers()
        self.ranges: Any = None

    @property
    def layers(self) -> list[str]:
        """Names of the layers that can be quantised, in the order of the graph."""
        return list(dict.fromkeys(self.layer_of.values()))

    def measure_ranges(self, inputs: Iterable[np.ndarray], method: str) -> None:
        """Measures the range of every tensor over inputs (N,C,h,w)."""
        calibrate = import_module("onnxruntime.quantization.calibrate")
        name, options = METHODS[method]
        with TemporaryDirectory() as folder, _quiet():
            plain, augmented = Path(folder) / "plain.onnx", Path(folder) / "augmented.onnx"
            self.onnx.save(self.proto, plain)
            kind = calibrate.CalibrationMethod[name]
            collector = calibrate.create_calibrator(plain, OPERATORS, str(augmented), kind, extra_options=options)
            for each in inputs:  # one by one: calibrators keep all tensors of the inputs that they are given together
                collector.collect_data(Once(each))
            self.ranges = collector.compute_data()

    def quantized(self, layers: Collection[str]) -> bytes:
        """The graph with these layers in int8, at least one, as the content of an ONNX file."""
        kinds = import_module("onnxruntime.quantization").QuantType
        made_by = import_module("onnxruntime.quantization.qdq_quantizer").QDQQuantizer
        chosen = [node for node, layer in self.layer_of.items() if layer in layers]
        proto = self.onnx.ModelProto()
        proto.CopyFrom(self.proto)  # the quantiser changes what it is given
        with _quiet():
            quantizer = made_by(
                proto,
                per_channel=True,
                reduce_range=True,
                weight_qType=kinds.QInt8,
                activation_qType=kinds.QUInt8,
                tensors_range=self.ranges,
                nodes_to_quantize=chosen,
                nodes_to_exclude=[],
                op_types_to_quantize=OPERATORS,
                extra_options={},
            )
            made = quantizer.quantize_model()
        del made.metadata_props[:]  # the quantiser adds its own
        floats = [layer for layer in self.layers if layer not in layers]
        self.onnx.helper.set_model_props(made, self.header | {"float_layers": json.dumps(floats)})
        return made.SerializeToString()

    def _find_layers(self) -> dict[str, str]:
        """The layer of each node that can be quantised, by the node's name."""
        graph = self.proto.graph
        for index, node in enumerate(graph.node):
            node.name = f"{node.name}_{index}"  # the quantiser knows nodes by their names
        stored = {each.name for each in graph.initializer}
        first = {value.name for value in graph.input}
        found: dict[str, str] = {}
        behind: dict[str, str] = {}  # the layer that each tensor comes from
        for node in graph.node:
            own = [name for name in node.input if name in stored and name.startswith("model.")]
            if any(name.startswith(f"model.{CLASSIFIER}.") for name in own):
                break  # a classifier is the end of every graph
            weighted = node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and any(
                name in stored for name in node.input
            )
            layer = next((behind[name] for name in node.input if name in behind), "")
            if weighted:
                reads_image = any(name in first for name in node.input)
                layer = "" if reads_image else (own[0] if own else node.name)
                layer = layer.removeprefix("model.").removesuffix(".weight")
            if layer and node.op_type in OPERATORS:
                found[node.name] = layer
            behind |= dict.fromkeys(node.output, layer)
        return found

    def _bound_gates(self) -> None:
        """Replaces a convolution and HardSigmoid, which has no int8 kernel, by a scaled convolution and Clip to 0..1.

        This is equal up to rounding: HardSigmoid is max(0, min(1, alpha · x + beta)).
        """
        helper, graph = self.onnx.numpy_helper, self.proto.graph
        maker = {name: node for node in graph.node for name in node.output}
        uses = Counter(name for node in graph.node for name in node.input)
        stored = {each.name: each for each in graph.initializer}
        bounds = {"gate_low": 0.0, "gate_high": 1.0}
        for node in [node for node in graph.node if node.op_type == "HardSigmoid"]:
            before = maker.get(node.input[0])
            if before is None or before.op_type != "Conv" or len(before.input) != 3 or uses[before.output[0]] != 1:
                continue
            if any(uses[name] != 1 or name not in stored for name in before.input[1:]):
                continue
            given = {each.name: each.f for each in node.attribute}
            alpha, beta = given.get("alpha", 0.2), given.get("beta", 0.5)
            for name, shift in zip(before.input[1:], (0.0, beta), strict=True):
                values = helper.to_array(stored[name]) * np.float32(alpha) + np.float32(shift)
                stored[name].CopyFrom(helper.from_array(values, name))
            del node.attribute[:]
            node.op_type = "Clip"
            node.input.extend(bounds)
            if "gate_low" not in stored:
                for name, value in bounds.items():
                    graph.initializer.append(helper.from_array(np.float32(value), name))
                    stored[name] = graph.initializer[-1]


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside this context ONNX Runtime's quantiser prints nothing: neither its steps nor its advice."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
