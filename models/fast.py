"""A trained network as fast as this machine runs it, in one call.

>>> fast = accelerate(model)
>>> logits = fast(images)  # float32, the first call of a size compiles
"""

import os
import shutil
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from ssaseg.models.deploy import fold
from ssaseg.models.segmenter import Segmenter


def accelerate(model: Segmenter, dtype: torch.dtype | None = None, compiled: bool | None = None) -> nn.Module:
    """A copy of `model` for inference on the device where it is: folded, channels last, in bfloat16, compiled.

    dtype: of convolutions and matrix products; None takes bfloat16 where the device computes in it, else float32. The
    SSA classifier and SegNeXt's factorisation stay float32. compiled: None compiles where there is a compiler. That
    takes a minute or so at the first call, and again for every other shape of images; it pays after some hundred
    images of a shape. Shapes beyond PyTorch's limit (`torch._dynamo.config.recompile_limit`, 8) run uncompiled: for
    images of many sizes say compiled=False. The copy maps images (N,3,H,W) to logits (N,K,h,w), float32; it isn't
    bit-equal to `model`, and stays in evaluation mode. Raises TypeError for what is no `Segmenter`.
    """
    if not isinstance(model, Segmenter):
        raise TypeError(f"expected a Segmenter, as load_model returns it; got {type(model).__name__}")
    device = next(model.parameters()).device
    dtype = (torch.bfloat16 if has_bfloat16(device) else torch.float32) if dtype is None else dtype
    fast = Accelerated(model, dtype)
    if has_compiler(device) if compiled is None else compiled:
        # Without Python and launches between kernels: by CUDA graphs on a GPU, by weights as constants on a CPU.
        how = {"mode": "reduce-overhead"} if device.type == "cuda" else {"options": {"freezing": True}}
        # Not dynamic: kernels for any size are slower, and the compiler fails on some networks' sizes as symbols.
        fast.network = torch.compile(fast.network, dynamic=False, **how)  # type: ignore[call-overload,assignment]
    return fast


def has_bfloat16(device: torch.device) -> bool:
    """Does the device multiply in bfloat16, rather than emulate it?"""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile"))


def has_compiler(device: torch.device) -> bool:
    """Can `torch.compile` make kernels for the device?"""
    if device.type == "cuda":
        return find_spec("triton") is not None
    return any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "g++"), "clang++"))


class Accelerated(nn.Module):
    """`network`, a folded copy of a model, under autocast to `dtype`."""

    def __init__(self, model: Segmenter, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = fold(model)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = dtype
        for layer in (*self.network.backbone.modules(), *self.network.decoder.modules()):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.to(dtype)  # once, instead of by autocast in every pass
        self.eval()

    def train(self, mode: bool = True) -> "Accelerated":
        """Evaluation mode, whatever is asked for: what is folded can't be trained."""
        return super().train(False)

    @torch.no_grad()  # what inference mode makes, compiled code cannot always take
    def forward(self, images: Tensor) -> Tensor:
        """Normalised RGB images (N,3,H,W) → logits (N,K,h,w), float32."""
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.network(images).float()
