"""What use needs of a trained network, and nothing else: norms folded into convolutions, and an output to choose.

Axes: N images, K classes, H×W pixels of the input, h×w of the logits.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ssaseg.models.layers import ConvNorm, resize_bilinear
from ssaseg.models.segmenter import Segmenter

LABELS = 256  # classes at most that uint8 labels can tell apart


def fold(model: Segmenter) -> Segmenter:
    """A copy for inference: every `ConvNorm` is one convolution with bias, what only training needs is gone.

    In evaluation mode and without gradients; the same logits up to float32's rounding. Other norms, such as those that
    two branches read, stay as they are. The copy can't be trained; `model` is left as it is.
    """
    lean = copy.deepcopy(model).eval().requires_grad_(False)
    lean.drop_training_only()
    for parent in list(lean.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ConvNorm):
                setattr(parent, name, _folded(child.conv, child.norm))
    return lean


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """`conv`, changed to compute what norm(conv(x)) does in evaluation."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    # In double precision: what is rounded here stays in the weights for good.
    scale = norm.weight.double() / (variance.double() + norm.eps).sqrt()
    bias = 0.0 if conv.bias is None else conv.bias.double()
    shift = norm.bias.double() + (bias - mean.double()) * scale
    weight = conv.weight.double() * scale[:, None, None, None]
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
    return conv


# ---- from pixels to an output ------------------------------------------------------------------------------------


class Normalize(nn.Module):
    """(value - mean) / std of each channel, from RGB of 0 to 255 in any number type."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(N,3,H,W) → float32 (N,3,H,W)."""
        return (images.float() - self.mean) / self.std


def at_input_size(logits: Tensor, size: torch.Size) -> Tensor:
    """(N,K,h,w) → (N,K,H,W), one bilinear step with align_corners=False."""
    return resize_bilinear(logits, size)


def labels_of(logits: Tensor, size: torch.Size) -> Tensor:
    """(N,K,h,w) → uint8 (N,H,W), an eighth of int64 to copy off a device; no softmax, which ranks alike."""
    return at_input_size(logits, size).argmax(dim=1).to(torch.uint8)


# What a deployed network may give, made of its logits and the input's size (H, W).
OUTPUTS: Mapping[str, Callable[[Tensor, torch.Size], Tensor]] = {
    "logits": lambda logits, size: logits,
    "logits-full": at_input_size,
    "labels": labels_of,
}


class Deployed(nn.Module):
    """A network from images to one of `OUTPUTS`; `prepare` is the identity, or a `Normalize` to take plain RGB.

    Raises ValueError for an unknown output, and for labels of more classes than uint8 holds.
    """

    def __init__(self, model: Segmenter, output: str = "logits", prepare: nn.Module | None = None) -> None:
        super().__init__()
        if output not in OUTPUTS:
            raise ValueError(f"output {output!r} is not known\nknown: {', '.join(OUTPUTS)}")
        if output == "labels" and model.num_classes > LABELS:
            raise ValueError(f"labels are uint8, for at most {LABELS} classes; the model has {model.num_classes}")
        self.prepare = prepare or nn.Identity()
        self.model = model
        self.finish = OUTPUTS[output]

    def forward(self, images: Tensor) -> Tensor:
        """Images (N,3,H,W), H and W at least 32 → logits (N,K,h,w) or (N,K,H,W), or labels uint8 (N,H,W)."""
        return self.finish(self.model(self.prepare(images)), images.shape[-2:])


# ---- a graph -----------------------------------------------------------------------------------------------------


def trace(network: Deployed, images: Tensor, any_size: bool = True) -> ExportedProgram:
    """The network as torch.export's graph, for any batch, and any size from `smallest` on where `any_size` says so.

    `images` (N,3,H,W): an example with N at least 2. Raises RuntimeError where PyTorch finds the graph to depend on
    more than that.
    """
    free: dict[int, Any] = {0: Dim("batch", min=1)}
    if any_size:
        free |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(network.eval(), (images,), dynamic_shapes={"images": free})
    # What a file would hold for nothing: paths of the machine that exported, the example.
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta.pop("stack_trace", None)
    program.example_inputs = None
    return program


def sides(program: ExportedProgram) -> tuple[Any, Any]:
    """Height and width that a traced graph takes: integers, or PyTorch's symbols."""
    images = next(node for node in program.graph.nodes if node.name == "images")
    height, width = images.meta["val"].shape[2:]
    return height, width


def smallest(program: ExportedProgram) -> tuple[int, int]:
    """Least height and width that a traced graph takes [pixels]."""
    ranges = {str(symbol): int(range_.lower) for symbol, range_ in program.range_constraints.items()}
    height, width = (side if isinstance(side, int) else ranges[str(side)] for side in sides(program))
    return height, width


class PoolByProducts(TorchFunctionMode):
    """While active, adaptive average pooling is two matrix products, as a graph for ONNX has to have it.

    ONNX has no such pooling, and PyTorch's exporter takes it apart for one size only.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every function as it is, but that one."""
        return (pool_by_products if func is F.adaptive_avg_pool2d else func)(*args, **(kwargs or {}))


def pool_by_products(maps: Tensor, output_size: int | Sequence[int]) -> Tensor:
    """`F.adaptive_avg_pool2d`: (N,C,H,W) → (N,C,*output_size)."""
    parts = (output_size, output_size) if isinstance(output_size, int) else output_size
    rows, columns = (_shares(length, count, maps) for length, count in zip(maps.shape[-2:], parts, strict=True))
    return rows @ maps @ columns.T


def _shares(length: int, parts: int, like: Tensor) -> Tensor:
    """(parts, length): each position's share in a part's mean, over ⌊i·length/parts⌋ … ⌈(i+1)·length/parts⌉ - 1."""
    part = torch.arange(parts, device=like.device)[:, None]
    start = torch.div(part * length, parts, rounding_mode="floor")
    end = torch.div((part + 1) * length + parts - 1, parts, rounding_mode="floor")
    position = torch.arange(length, device=like.device)
    return ((position >= start) & (position < end)).to(like.dtype) / (end - start).to(like.dtype)
