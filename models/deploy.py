"""Networks for deployment: only what inference needs, norms folded into convolutions, and a choice of outputs.

Axes: N images, K classes, H×W pixels of the input, h×w of the logits.
"""

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

LABELS = 256  # most classes that uint8 labels can hold


def fold(model: Segmenter) -> Segmenter:
    """A copy for inference: each `ConvNorm` becomes one convolution with bias; what only training needs is removed.

    The copy is in evaluation mode and has no gradients; its logits are equal up to float32's rounding. Other norms
    stay, such as those whose output two branches read. The copy can't be trained. `model` does not change.
    """
    folded = model.copied().eval().requires_grad_(False)
    folded.drop_training_only()
    for parent in list(folded.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is ConvNorm:  # a subclass may do more, such as an activation
                setattr(parent, name, _folded(child.conv, child.norm))
    return folded


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """`conv`, changed so that it computes norm(conv(x)) of evaluation mode."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    # In double precision: an error of rounding here would stay in the weights.
    scale = norm.weight.double() / (variance.double() + norm.eps).sqrt()
    bias = 0.0 if conv.bias is None else conv.bias.double()
    shift = norm.bias.double() + (bias - mean.double()) * scale
    weight = conv.weight.double() * scale[:, None, None, None]
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
    return conv


# ---- from pixels to an output ------------------------------------------------------------------------------------


class Normalize(nn.Module):
    """(value - mean) / std of each channel; input: RGB in [0, 255] of any number type, or images of other channels."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(N,3,H,W) → float32 (N,3,H,W)."""
        return (images.float() - self.mean) / self.std


def at_input_size(logits: Tensor, size: torch.Size) -> Tensor:
    """(N,K,h,w) → (N,K,H,W), one bilinear step with align_corners=False."""
    return resize_bilinear(logits, size)


def labels_of(logits: Tensor, size: torch.Size) -> Tensor:
    """(N,K,h,w) → uint8 (N,H,W): an eighth of int64's bytes to copy. No softmax: it does not change the order."""
    return at_input_size(logits, size).argmax(dim=1).to(torch.uint8)


# The outputs of a deployed network, computed from its logits and the input's size (H, W).
OUTPUTS: Mapping[str, Callable[[Tensor, torch.Size], Tensor]] = {
    "logits": lambda logits, size: logits,
    "logits-full": at_input_size,
    "labels": labels_of,
}


class Deployed(nn.Module):
    """A network from images to one of `OUTPUTS`. `prepare`: None, or a `Normalize` if the input is RGB in [0, 255].

    Raises ValueError for an unknown output, and for labels of more classes than uint8 can hold.
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
    """The network as torch.export's graph, for any batch; with `any_size` also for any size of at least `smallest`.

    `images` (N,3,H,W): an example with N at least 2. Raises RuntimeError if PyTorch cannot make the graph so general.
    """
    free: dict[int, Any] = {0: Dim("batch", min=1)}
    if any_size:
        free |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(network.eval(), (images,), dynamic_shapes={"images": free})
    # Not for the file: paths of the machine that exported, and the example.
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta.pop("stack_trace", None)
    program.example_inputs = None
    return program


def sides(program: ExportedProgram) -> tuple[Any, Any]:
    """Height and width that a traced graph accepts: integers, or PyTorch's symbols."""
    images = next(node for node in program.graph.nodes if node.name == "images")
    height, width = images.meta["val"].shape[2:]
    return height, width


def smallest(program: ExportedProgram) -> tuple[int, int]:
    """Smallest height and width that a traced graph accepts [pixels]."""
    ranges = {str(symbol): int(range_.lower) for symbol, range_ in program.range_constraints.items()}
    height, width = (side if isinstance(side, int) else ranges[str(side)] for side in sides(program))
    return height, width


class PoolByProducts(TorchFunctionMode):
    """While active, adaptive average pooling is computed as two matrix products, for graphs that become ONNX.

    ONNX has no adaptive pooling, and PyTorch's exporter supports it for a single size only.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replaces that function and calls all others unchanged."""
        return (pool_by_products if func is F.adaptive_avg_pool2d else func)(*args, **(kwargs or {}))


def pool_by_products(maps: Tensor, output_size: int | Sequence[int]) -> Tensor:
    """`F.adaptive_avg_pool2d`: (N,C,H,W) → (N,C,*output_size)."""
    size = (output_size, output_size) if isinstance(output_size, int) else output_size
    rows, columns = (_shares(length, count, maps) for length, count in zip(maps.shape[-2:], size, strict=True))
    return rows @ maps @ columns.T


def _shares(length: int, count: int, like: Tensor) -> Tensor:
    """(count, length): share of each position in mean i, which is over ⌊i·length/count⌋ … ⌈(i+1)·length/count⌉ - 1."""
    mean = torch.arange(count, device=like.device)[:, None]
    start = torch.div(mean * length, count, rounding_mode="floor")
    end = torch.div((mean + 1) * length + count - 1, count, rounding_mode="floor")
    position = torch.arange(length, device=like.device)
    return ((position >= start) & (position < end)).to(like.dtype) / (end - start).to(like.dtype)
