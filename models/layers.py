"""Blocks that two or more networks use.

Axes: N images, C channels, H×W pixels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNorm(nn.Sequential):
    """Convolution without bias, then BatchNorm (eps 1e-5, momentum 0.1); "same" padding for odd kernels.

    The norm's weight starts at `norm_weight`: 0 silences a residual branch until training wakes it.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, norm_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        nn.init.constant_(self.norm.weight, norm_weight)


class DropPath(nn.Module):
    """Stochastic depth: in training drops a residual branch per image with probability `rate` and rescales the rest.

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
        # Drawn in float32 whatever the branch's type: bfloat16 has too few values in [0, 1) for a fair coin.
        kept = torch.rand(branch.shape[:1] + (1,) * (branch.dim() - 1), device=branch.device) < keep
        return branch * (kept / keep).to(branch.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


def resize_bilinear(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """(N,C,H,W) → (N,C,*size), bilinear with align_corners=False; no work where the size is right already."""
    if maps.shape[-2:] == torch.Size(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def init_fan_out(module: nn.Module) -> None:
    """Convolutions ~ N(0, 2 / (kernel area · outputs / groups)), biases 0: He initialisation over the fan-out."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels // layer.groups
            nn.init.normal_(layer.weight, 0.0, (2.0 / fan_out) ** 0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def init_conv_module(module: nn.Module) -> None:
    """Convolutions ~ N(0, 2 / (kernel area · outputs)): mmcv's `ConvModule`, blind to groups unlike `init_fan_out`."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
