"""Reads .pt2 files and runs their graphs, without `torch.export.load`: that unpickles, evaluates texts as Python, and
calls any function that the file names. Here a file holds numbers, and a list of operations out of OPERATIONS.

Source of the format: PyTorch 2.13, `torch/_export/serde/schema.py` and `torch/export/pt2_archive`.
"""

import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor

from ssaseg.cli.weights.export import HEADER

# Those of all networks here, without the overload that follows the second dot: pure functions of tensors.
OPERATIONS = frozenset({
    "_assert_scalar", "_assert_tensor_metadata", "adaptive_avg_pool2d", "add", "alias", "amax", "arange", "argmax",
    "avg_pool2d", "batch_norm", "bmm", "broadcast_tensors", "cat", "chunk", "clamp", "clamp_min", "clone",
    "constant_pad_nd", "contiguous", "conv2d", "conv_transpose2d", "detach", "div", "dropout", "einsum", "eq", "exp",
    "expand", "expand_as", "feature_dropout", "flatten", "full", "ge", "gelu", "grid_sampler", "group_norm", "gt",
    "hardsigmoid", "hardswish", "hardtanh", "index", "layer_norm", "le", "lift_fresh_copy", "linalg_vector_norm",
    "linear", "log", "lt", "mT", "matmul", "max", "max_pool2d", "maximum", "mean", "mul", "ne", "neg", "norm", "ones",
    "pad", "permute", "pow", "reciprocal", "relu", "relu6", "repeat", "reshape", "roll", "rsqrt",
    "scaled_dot_product_attention", "select", "sigmoid", "silu", "slice", "softmax", "split", "split_with_sizes",
    "sqrt", "square", "squeeze", "stack", "sub", "sum", "sym_size", "to", "transpose", "unbind", "unflatten",
    "unsqueeze", "upsample_bicubic2d", "upsample_bilinear2d", "upsample_linear1d", "view", "where", "zeros",
})  # fmt: skip
WRAPPED = "torch.ops.higher_order.wrap_with_autocast"  # a graph in the graph, computed without autocast
# Of sizes, which are integers here.
SYMBOLIC: Mapping[str, Callable[..., Any]] = {
    "=": lambda value: value,
    "_operator.add": operator.add,
    "_operator.sub": operator.sub,
    "_operator.mul": operator.mul,
    "_operator.floordiv": operator.floordiv,
    "_operator.truediv": operator.truediv,
    "_operator.mod": operator.mod,
    "_operator.neg": operator.neg,
    "_operator.eq": operator.eq,
    "_operator.ne": operator.ne,
    "_operator.lt": operator.lt,
    "_operator.le": operator.le,
    "_operator.gt": operator.gt,
    "_operator.ge": operator.ge,
    "_operator.and_": operator.and_,
    "_operator.or_": operator.or_,
    "math.trunc": math.trunc,
    "torch.sym_int": int,
    "torch.sym_float": float,
    "torch.sym_max": max,
    "torch.sym_min": min,
    "torch.sym_not": operator.not_,
}
TYPES = {
    1: torch.uint8, 2: torch.int8, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
PLAIN = ("as_int", "as_bool", "as_string", "as_ints", "as_bools")

Run = Callable[[Tensor], Tensor]
End = tuple[str, tuple[int | None, ...]]  # of a graph: the type and shape of an input or output


@dataclass(frozen=True)
class Step:
    """One operation of a graph."""

    function: Callable[..., Any]
    inputs: list[tuple[str | None, Any]]  # keyword, or None for a position; and the argument as the file has it
    outputs: list[str]
    done: list[str]  # values that no later step needs


@dataclass(frozen=True)
class Program:
    """A graph and its weights."""

    steps: list[Step]
    values: dict[str, Tensor]  # weights by the names of the graph
    image: str
    output: str

    def on(self, device: torch.device) -> Run:
        """A function from images to logits; several threads may call it."""
        weights = {name: value.to(device) for name, value in self.values.items()}

        @torch.inference_mode()
        def run(images: Tensor) -> Tensor:
            values: dict[str, Any] = {**weights, self.image: images}
            for step in self.steps:
                positions = [_fill(each, values, device) for keyword, each in step.inputs if keyword is None]
                named = {keyword: _fill(each, values, device) for keyword, each in step.inputs if keyword is not None}
                found = step.function(*positions, **named)
                if step.outputs:
                    several = found if isinstance(found, list | tuple) else [found]
                    values.update(zip(step.outputs, several, strict=True))
                for name in step.done:
                    del values[name]
            result: Tensor = values[self.output]
            return result

        return run


def read_pt2(content: bytes) -> tuple[Program, tuple[list[End], list[End]], dict[str, str]]:
    """The program in a file, its inputs and outputs, and our header, JSON values by key.

    Raises ValueError with the reason for operations that are not known, and various errors for damaged files.
    """
    with ZipFile(BytesIO(content)) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if any(info.compress_type != ZIP_STORED for info in records.values()):
            raise ValueError("a record in it is compressed, which PyTorch never does")
        if "models/model.json" not in records:
            raise ValueError("it has no models/model.json, as PyTorch 2.8 and later write it")
        texts = {name: archive.read(info) for name, info in records.items() if name.endswith(".json")}
        weights = _tensors(archive, records, texts, "data/weights/", "weights")
        weights |= _tensors(archive, records, texts, "data/constants/", "constants")
    module = json.loads(texts["models/model.json"])["graph_module"]
    graph, signature = module["graph"], module["signature"]
    values: dict[str, Tensor] = {}
    images: list[str] = []
    for spec in signature["input_specs"]:
        ((kind, inner),) = spec.items()
        if kind == "user_input":
            images.append(inner["arg"]["as_tensor"]["name"])
        else:
            values[inner["arg"]["name"]] = weights[inner[f"{kind}_name"]]
    outputs = [spec["user_output"]["arg"]["as_tensor"]["name"] for spec in signature["output_specs"]]
    header = json.loads(texts.get(f"extra/{HEADER}", b"{}"))
    program = Program(_steps([*_inlined(graph["nodes"])], {*values, *images, *outputs}), values, images[0], outputs[0])
    ends = [[_end(graph["tensor_values"][name]) for name in names] for names in (images, outputs)]
    return program, (ends[0], ends[1]), {key: json.dumps(value) for key, value in header.items()}


def _tensors(
    archive: ZipFile, records: Mapping[str, Any], texts: Mapping[str, bytes], folder: str, kind: str
) -> dict[str, Tensor]:
    """The tensors in a folder of the archive, by name."""
    found = {}
    for name, each in json.loads(texts[f"{folder}model_{kind}_config.json"])["config"].items():
        meta, path = each["tensor_meta"], each["path_name"]
        if each["use_pickle"] or meta is None:
            raise ValueError("it holds a pickle, which is not read")
        sizes, strides = ([side["as_int"] for side in meta[key]] for key in ("sizes", "strides"))
        raw, dtype = bytearray(archive.read(records[folder + path])), TYPES[meta["dtype"]]
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        found[name] = flat.as_strided(sizes, strides, meta["storage_offset"]["as_int"])
    return found


def _end(meta: Mapping[str, Any]) -> End:
    return str(TYPES[meta["dtype"]]).removeprefix("torch."), tuple(side.get("as_int") for side in meta["sizes"])


def _steps(nodes: list[Any], kept: set[str]) -> list[Step]:
    """The operations in their order. `kept`: names of values that are needed to the end."""
    steps: list[Step] = []
    later = set(kept)
    for node in reversed(nodes):
        outputs = [name for each in node["outputs"] for name in _names(each)]
        used = {*outputs, *(name for each in node["inputs"] for name in _names(each["arg"]))}
        function, symbolic = _function(node["target"])
        inputs = [
            (None if symbolic or each["kind"] == 1 else str(each["name"]), each["arg"]) for each in node["inputs"]
        ]
        steps.append(Step(function, inputs, outputs, sorted(used - later)))
        later |= used
    return steps[::-1]


def _inlined(nodes: list[Any], prefix: str = "") -> Iterator[Any]:
    """The operations of a graph, with those of graphs in it in the places of these. `prefix`: of all names."""
    for number, node in enumerate(nodes):
        if node["target"] != WRAPPED:
            yield _renamed(node, prefix)
            continue
        _, _, enabled, _, wrapped, *given = (each["arg"] for each in node["inputs"])
        if enabled != {"as_bool": False}:
            raise ValueError("a part of it computes in another type")
        graph, inner = wrapped["as_graph"]["graph"], f"{prefix}{number}."
        yield from _equal(graph["inputs"], inner, given, prefix)
        yield from _inlined(graph["nodes"], inner)
        yield from _equal(node["outputs"], prefix, graph["outputs"], inner)


def _equal(outputs: list[Any], prefix: str, values: list[Any], other: str) -> Iterator[Any]:
    """Steps that give values other names."""
    names = [(out, value) for out, value in zip(map(_names, outputs), map(_names, values), strict=True)]
    for out, value in ((a, b) for left, right in names for a, b in zip(left, right, strict=True)):
        argument = {"as_tensor": {"name": other + value}}
        yield {
            "target": "=",
            "inputs": [{"name": "", "arg": argument, "kind": 1}],
            "outputs": [{"as_tensor": {"name": prefix + out}}],
        }


def _renamed(node: Any, prefix: str) -> Any:
    """An operation with `prefix` before the names of its values."""
    if isinstance(node, list):
        return [_renamed(each, prefix) for each in node]
    if not isinstance(node, dict):
        return node
    if "arg" in node:  # whose own name is that of an argument
        return {**node, "arg": _renamed(node["arg"], prefix)}
    return {
        key: prefix + value if key in ("name", "as_name") and value is not None else _renamed(value, prefix)
        for key, value in node.items()
        if key != "metadata"
    }


def _function(target: str) -> tuple[Callable[..., Any], bool]:
    """The function of an operation, and whether it is one of sizes. Raises ValueError for one that is not known."""
    if target in SYMBOLIC:
        return SYMBOLIC[target], True
    space, _, name = target.rpartition("torch.ops.aten.")
    name, _, overload = name.partition(".")
    if space or name.removesuffix("_") not in OPERATIONS or not overload.isidentifier() or overload.startswith("_"):
        raise ValueError(f"an operation in it is not known: {target[:80]}")
    return getattr(getattr(torch.ops.aten, name), overload), False


def _names(argument: Any) -> Iterator[str]:
    """The names of values in an argument as the file has it."""
    if isinstance(argument, dict):
        for key, value in argument.items():
            if key in ("name", "as_name"):
                yield value
            else:
                yield from _names(value)
    elif isinstance(argument, list):
        for each in argument:
            yield from _names(each)


def _fill(argument: Mapping[str, Any], values: Mapping[str, Any], device: torch.device) -> Any:
    """The value of an argument. Raises ValueError for a kind that no network here has."""
    ((kind, value),) = argument.items()
    match kind:
        case "as_none":
            return None
        case "as_name":
            return values[value]
        case "as_tensor":
            return values[value["name"]]
        case "as_tensors":
            return [values[each["name"]] for each in value]
        case "as_sym_int" | "as_sym_float" | "as_sym_bool" | "as_optional_tensor":
            return _fill(value, values, device)
        case "as_sym_ints" | "as_sym_floats" | "as_sym_bools" | "as_optional_tensors":
            return [_fill(each, values, device) for each in value]
        case "as_float":
            return float(value)  # infinity is a text
        case "as_floats":
            return [float(each) for each in value]
        case "as_scalar_type":
            return TYPES[value]
        case "as_memory_format":
            return FORMATS[value]
        case "as_layout":
            return torch.strided
        case "as_device":
            return device
        case _ if kind in PLAIN:
            return value
    raise ValueError(f"an argument in it is not known: {kind[:80]}")
