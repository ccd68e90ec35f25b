"""Fast inference on this machine, in one call.

>>> fast = accelerate(model)
>>> logits = fast(images)  # float32; the first call with a new size compiles
"""

import os
import shutil
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from ssaseg.models.deploy import fold
from ssaseg.models.masks.base import MaskSegmenter
from ssaseg.models.segmenter import Segmenter


def accelerate(model: Segmenter, dtype: torch.dtype | None = None, compiled: bool | None = None) -> nn.Module:
    """A copy of `model` for inference on the model's device: folded, channels last, in bfloat16, compiled.

    The copy maps images (N,3,H,W) to logits (N,K,h,w), float32. Its results are not bit-equal to those of `model`. It
    always stays in evaluation mode.

    Args:
        model: the network, for example from `load_model`.
        dtype: type of convolutions and matrix products; None: bfloat16 where the device computes in it, else float32.
            The SSA classifier and SegNeXt's factorisation stay float32.
        compiled: whether to compile; None: yes if there is a compiler. Compiling takes about a minute at the first
            call, and again for each new shape of images; it is worth the time from some hundred images of a shape on.
            PyTorch compiles for at most 8 shapes (`torch._dynamo.config.recompile_limit`), others run uncompiled: for
            images of many sizes pass compiled=False.

    Raises:
        TypeError: `model` is not a `Segmenter`, or is a mask method.
    """
    if isinstance(model, MaskSegmenter):
        raise TypeError(f"{model.name} is a mask method; expected a network with a classifier")
    if not isinstance(model, Segmenter):
        raise TypeError(f"expected a Segmenter, as load_model returns it; got {type(model).__name__}")
    device = next(model.parameters()).device
    dtype = (torch.bfloat16 if has_bfloat16(device) else torch.float32) if dtype is None else dtype
    fast = Accelerated(model, dtype)
    if has_compiler(device) if compiled is None else compiled:
        # On a GPU, CUDA graphs save the launches between kernels; on a CPU, the weights become constants.
        how = {"mode": "reduce-overhead"} if device.type == "cuda" else {"options": {"freezing": True}}
        # Not dynamic: kernels for any size are slower, and for some networks the compiler fails with symbolic sizes.
        fast.network = torch.compile(fast.network, dynamic=False, **how)  # type: ignore[call-overload,assignment]
    return fast


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 itself, without emulation."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile"))


def has_compiler(device: torch.device) -> bool:
    """Whether `torch.compile` can make kernels for the device."""
    if device.type == "cuda":
        return find_spec("triton") is not None
    return any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "g++"), "clang++"))


def for_inference(model: Segmenter, dtype: torch.dtype = torch.float32) -> Segmenter:
    """A folded copy, channels last, whose convolutions and matrix products before the classifier are of `dtype`.

    Run it under autocast to `dtype`. `model` does not change.
    """
    network = fold(model)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for layer in (*network.backbone.modules(), *network.decoder.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.to(dtype)  # once; autocast would do it in each pass
    return network


class Accelerated(nn.Module):
    """Runs `network`, a folded copy of a model, under autocast to `dtype`."""

    def __init__(self, model: Segmenter, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = for_inference(model, dtype)
        self.dtype = dtype
        self.eval()

    def train(self, mode: bool = True) -> "Accelerated":
        """Stays in evaluation mode, also for mode=True: a folded network can't be trained."""
        return super().train(False)

    @torch.no_grad()  # not inference_mode: compiled code cannot always use its tensors
    def forward(self, images: Tensor) -> Tensor:
        """Normalised RGB images (N,3,H,W) → logits (N,K,h,w), float32."""
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.network(images).float()
