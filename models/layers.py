"""Building blocks that two or more networks use.

Axes: N images, C channels, H×W pixels.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


class ConvNorm(nn.Sequential):
    """Convolution, then BatchNorm (eps 1e-5, momentum 0.1); "same" padding for odd kernels (height, width).

    The norm's weight starts at `norm_weight`: with 0, a residual branch adds nothing until training changes the weight.
    A `bias` before a norm has no effect, but the checkpoints of some official networks contain it.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        groups: int = 1,
        norm_weight: float = 1.0,
        bias: bool = False,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2 * dilation, width // 2 * dilation)
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, dilation, groups, bias)
        self.norm = nn.BatchNorm2d(outputs)
        nn.init.constant_(self.norm.weight, norm_weight)


class ConvGroupNorm(nn.Sequential):
    """1×1 convolution without bias, then GroupNorm of 32 groups (eps 1e-5): mmcv's `ConvModule` with `norm_cfg` GN."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm = nn.GroupNorm(32, outputs)


class Depthwise(nn.Conv2d):
    """Depthwise convolution with bias and "same" padding for odd kernels (height, width)."""

    def __init__(self, channels: int, kernel: int | tuple[int, int], stride: int = 1) -> None:
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2)
        super().__init__(channels, channels, (height, width), stride, padding, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,C,H,W), of a stride s (N,C,⌈H/s⌉,⌈W/s⌉).

        In training on a CPU, a kernel 1×k reads the rows of the channels-last maps as columns of one-pixel-wide maps:
        the output is the same, and the gradient of the weight is computed up to 30 times as fast (oneDNN 3).
        """
        (height, length), (count, channels, rows, columns) = self.kernel_size, x.shape
        if height > 1 or not 1 < length <= columns or self.stride != (1, 1) or not self._trained_on_cpu(x):
            return super().forward(x)
        turned = x.permute(0, 2, 3, 1).reshape(count * rows, columns, 1, channels).permute(0, 3, 1, 2)
        kernel = self.weight.view(channels, 1, length, 1)
        result = F.conv2d(turned, kernel, self.bias, padding=(length // 2, 0), groups=channels)
        return result.permute(0, 2, 3, 1).reshape(count, rows, columns, channels).permute(0, 3, 1, 2)

    def _trained_on_cpu(self, x: Tensor) -> bool:
        """Whether float32 maps, channels last, are computed on a CPU with gradients, and no graph is made of it."""
        plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        learns = self.training and torch.is_grad_enabled() and self.weight.requires_grad
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        return plain and learns and channels_last and not torch.compiler.is_compiling()


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a residual branch with probability `rate` per image and rescales the others.

    Source: "Deep Networks with Stochastic Depth" (Huang et al. 2016), per sample as in timm.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """(N,...) → (N,...); the identity in evaluation."""
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        # Drawn in float32 for every type of branch: bfloat16 has too few values in [0, 1) for an exact probability.
        kept = torch.rand(branch.shape[:1] + (1,) * (branch.dim() - 1), device=branch.device) < keep
        return branch * (kept / keep).to(branch.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class Checkpointed(nn.Module):
    """Base of modules whose blocks can compute activations again in the backward pass instead of keeping them.

    `checkpointing` turns it on for training. Gradients stay the same, also behind DropPath: the second pass draws the
    same random numbers. Modules with BatchNorm can't be part of it, since they would update their statistics twice.
    """

    checkpointing = False

    def run(self, block: nn.Module, *given: Any) -> Any:
        """`block(*given)`, without keeping what is computed inside if `checkpointing` is on."""
        if self.checkpointing and block.training and torch.is_grad_enabled():
            return checkpoint(block, *given, use_reentrant=False)
        return block(*given)


def run_stages(stages: Iterable[nn.Module], x: Tensor) -> list[Tensor]:
    """The outputs of stages that run one after the other, each with the output of the one before, from x (N,C,H,W)."""
    maps = []
    for stage in stages:
        x = stage(x)
        maps.append(x)
    return maps


def resize_bilinear(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """(N,C,H,W) → (N,C,*size), bilinear with align_corners=False; maps of this size are returned unchanged."""
    if maps.shape[-2:] == torch.Size(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def init_fan_out(module: nn.Module) -> None:
    """Convolutions ~ N(0, 2 / (kernel area · outputs / groups)), biases 0: He initialisation over the fan-out."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels // layer.groups
            nn.init.normal_(layer.weight, 0.0, (2.0 / fan_out) ** 0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def init_conv_module(module: nn.Module) -> None:
    """Convolutions ~ N(0, 2 / (kernel area · outputs)): mmcv's `ConvModule`; unlike `init_fan_out`, ignores groups."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def init_linear(module: nn.Module) -> None:
    """Linear layers ~ N(0, 0.02²), cut at ±2, biases 0: as in most vision transformers."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def drop_path_rates(last: float, depths: tuple[int, ...]) -> list[float]:
    """One rate per block over all stages, growing evenly from 0 to `last`."""
    blocks = sum(depths)
    return [last * block / max(blocks - 1, 1) for block in range(blocks)]


def norm_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The norms' statistics by key of the state dict: all that a forward pass in training changes in a model."""
    return {
        f"{prefix}.{name}".lstrip("."): buffer
        for prefix, module in model.named_modules()
        if isinstance(module, _NormBase)
        for name, buffer in module.named_buffers(recurse=False)
    }
