"""The size and the work of a network: parameters, and multiply-accumulates in two countings.

Multiply-accumulates are counted in two ways, since published figures differ from the work that is done. "Every
operation" is half of what `torch.utils.flop_counter` counts: all convolutions and matrix products. "Modules only" is
the way of the papers, `get_model_complexity_info` of mmcv 1.x: it hooks modules, so it misses the matrix products of
attention and of the SSA classifier.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ssaseg.models import Segmenter
from ssaseg.models.masks.deform import countable
from ssaseg.models.networks import segformer
from ssaseg.models.segmenter import is_below

EVERY_OPERATION = "every operation"

MODULES_ONLY = "modules only (the papers' way)"

COUNTINGS = {
    EVERY_OPERATION: "convolutions and matrix products (torch.utils.flop_counter / 2); no bias, norm or activation",
    MODULES_ONLY: "convolution and linear modules, ReLU family, GroupNorm, LayerNorm, pooling and upsampling modules, "
    "as mmcv 1.x counts them; no BatchNorm (mmcv misses its replacement of SyncBatchNorm), no other activation, no "
    "matrix product outside a module",
}

# An activation counts as one operation per element. The official networks compute a hard sigmoid with a ReLU6 module.
ACTIVATIONS = {F.relu, F.relu6, F.leaky_relu, F.hardsigmoid}

# (our module, its part) that lies inside `nn.MultiheadAttention` in the official networks, where no hook is called.
FUSED = ((segformer.Attention, "project"),)

POOLINGS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)


def count(model: Segmenter, image: Tensor) -> dict[str, Any]:
    """Parameters, and giga multiply-accumulates of one pass over `image` (1,3,H,W); both on the CPU.

    The parameters of the model take no gradient: otherwise the flop counter would hook the arguments of each module,
    which fails for an argument that is a parameter itself, such as SSA's table of prototypes.

    `parameters_deployed` does not count what only training uses: SSA's teacher branch and auxiliary heads, whose own
    number is `parameters_auxiliary`. `memory_mib`: the memory of pixels that some classifiers keep in training.
    """
    dropped, head = model.training_only(), model.classifier
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    # The flop counter does not know the fused attention of CPUs. As matrix products, it is counted everywhere.
    with (
        torch.inference_mode(),
        sdpa_kernel(SDPBackend.MATH),
        countable(),
        FlopCounterMode(display=False) as operations,
    ):
        modules = count_modules(model, image.cpu())
    return {
        "parameters": sum(sizes.values()),
        "parameters_deployed": sum(size for name, size in sizes.items() if not is_below(name, dropped)),
        "memory_mib": head.bank_bytes(head.channels, head.num_classes, **model.options) / 2**20,
        "parameters_auxiliary": sum(size for name, size in sizes.items() if is_below(name, ["auxiliary"])),
        "gmacs": {EVERY_OPERATION: operations.get_total_flops() / 2e9, MODULES_ONLY: modules / 1e9},
    }


def count_modules(model: nn.Module, image: Tensor) -> int:
    """Operations of one pass, counted as mmcv 1.x counts them for the official networks; see `COUNTINGS`.

    Our networks call activations as functions where the official ones have modules. These calls are counted, too.
    """
    total = 0

    def add(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal total
        total += module_operations(module, next(iter(inputs), None), output)  # layers themselves have one input

    class Activations(TorchFunctionMode):
        def __torch_function__(
            self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            nonlocal total
            output = function(*args, **(kwargs or {}))
            if function in ACTIVATIONS:
                total += output.numel()
            return output

    fused = [getattr(module, name) for module in model.modules() for kind, name in FUSED if isinstance(module, kind)]
    hooks = [module.register_forward_hook(add) for module in model.modules() if module not in fused]
    try:
        with Activations():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return total


def module_operations(module: nn.Module, given: Any, output: Any) -> int:
    """mmcv's formula for one call of one module; 0 for kinds that mmcv does not count. The factors are mmcv's, too."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        per_output = module.weight[0].numel() + (module.bias is not None)
        return output.numel() * per_output
    if isinstance(module, nn.ConvTranspose2d):
        per_input = module.weight[0].numel() * given.shape[1]
        return given[:, 0].numel() * per_input + (output.numel() if module.bias is not None else 0)
    if isinstance(module, nn.Linear):
        return given.numel() * module.out_features
    if isinstance(module, nn.GroupNorm | nn.LayerNorm):
        return given.numel() * (2 if module.weight is not None else 1)
    if isinstance(module, POOLINGS):
        return given.numel()
    if isinstance(module, nn.Upsample):
        return output[0].numel()
    return 0
