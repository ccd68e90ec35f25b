"""What a network costs: parameters, multiply-accumulates, latency and memory, with linear and ssa side by side.

Multiply-accumulates are counted in two ways, since published figures differ from the work that is done. "Every
operation" is half of what `torch.utils.flop_counter` counts: all convolutions and matrix products. "Modules only" is
the way of the papers, `get_model_complexity_info` of mmcv 1.x: it hooks modules, so it misses the matrix products of
attention and of the SSA classifier.
"""

import difflib
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ssaseg.cli.console import json_target, print_table, write_json
from ssaseg.cli.device import select_device
from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.models import CLASSIFIERS, Segmenter, build_model, list_mask_models, list_models, load_model
from ssaseg.models.labelling import label_map
from ssaseg.models.masks.base import MASKS
from ssaseg.models.masks.deform import countable
from ssaseg.models.networks import segformer
from ssaseg.models.segmenter import is_below

CLASSES = 150  # of a network that is given by name: the classes of ADE20K, as in published figures

SHOWN = ("linear", "ssa")  # classifiers of a network that is given by name

WARM_UP = 3  # passes before the first timed one

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


def run_profile(
    target: str,
    classifiers: Sequence[str],
    classes: int | None,
    size: Sequence[int],
    json_out: str | None,
    device: str,
    runs: int = 30,
) -> int:
    """Measures `target`, the name of a network or a checkpoint, on one image of `size` (height, width). Returns 0.

    classifiers: by name; empty: linear and ssa for a name, the checkpoint's own for a checkpoint. classes: number of
    classes, for a name; None: 150. json_out: a file; "-": stdout, without the table; or None. runs: timed passes.
    Raises CommandError if `target` is neither a name nor a file, or if classifier or classes are not the checkpoint's.
    """
    chosen = select_device(device)
    json_out = json_target(json_out)
    models = _models(target, classifiers, classes)
    channels = models[0].channels
    image = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0)).to(chosen)
    columns = [{"classifier": each.classifier_name, **count(each, image)} for each in models]
    for column, timings in zip(
        columns, measure_latency([each.to(chosen) for each in models], image, runs), strict=True
    ):
        column.update(timings)
    for column, model in zip(columns, models, strict=True):
        column["peak_mib"] = peak_memory(model, image) / 2**20
    report = {
        "target": target,
        "model": models[0].name,
        "classes": models[0].num_classes,
        "size": list(size),
        **conditions(chosen, runs),
        "columns": columns,
    }
    write_json(json_out, report)  # before printing, which may fail
    if json_out != "-":
        print_profile(report)
    return 0


def conditions(device: torch.device, runs: int) -> dict[str, Any]:
    """What the numbers of a report were measured with: device, threads, PyTorch, timed passes, and the countings."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "runs": runs,
        "countings": COUNTINGS,
    }


def _models(target: str, classifiers: Sequence[str], classes: int | None) -> list[Segmenter]:
    """The networks to measure, in evaluation mode on the CPU.

    Their parameters take no gradient: otherwise the flop counter would hook the arguments of each module, which fails
    for an argument that is a parameter itself, such as SSA's table of prototypes.
    """
    if target in list_models():
        made = (build_model(target, classes or CLASSES, name, memory=False) for name in classifiers or SHOWN)
        return [model.eval().requires_grad_(False) for model in made]
    if target in list_mask_models():
        return [mask_model(target, next(iter(classifiers), MASKS), classes or CLASSES)]
    if not Path(target).is_file():
        known = [*list_models(), *list_mask_models()]
        near = difflib.get_close_matches(target, known, n=1)
        fix = f"did you mean {near[0]}?" if near else f"networks: {', '.join(known)}"
        raise CommandError(f"{target}: neither the name of a network nor an existing checkpoint\n{fix}")
    model, _ = load_model(target)
    if set(classifiers) - {model.classifier_name}:
        raise CommandError(
            f"{target}: its classifier is {model.classifier_name}, not {', '.join(classifiers)}\n"
            f"leave out --classifier, or profile the network by name: {model.name}"
        )
    if classes not in (None, model.num_classes):
        raise CommandError(
            f"{target}: it has {model.num_classes} classes, not {classes}\n"
            f"leave out --classes, or profile the network by name: {model.name}"
        )
    return [model.requires_grad_(False)]


def mask_model(name: str, classifier: str = MASKS, classes: int = CLASSES) -> Segmenter:
    """A mask method to measure. Raises CommandError for a classifier, and if its package is not installed."""
    try:
        return build_model(name, classes, classifier).eval().requires_grad_(False)
    except ValueError as error:
        raise CommandError(str(error)) from None


# ---- counting ----------------------------------------------------------------------------------------------------
def count(model: Segmenter, image: Tensor) -> dict[str, Any]:
    """Parameters, and giga multiply-accumulates of one pass over `image` (1,3,H,W), of a model from `_models`.

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


# ---- measuring ---------------------------------------------------------------------------------------------------
def measure_latency(models: Sequence[Segmenter], image: Tensor, runs: int) -> list[dict[str, Any]]:
    """p50 and p90 [ms] of network and post-processing, per model. The models take turns, so that the load is the same.

    Post-processing: both bilinear steps and the arg-max; the labels stay on the device. The image (1,3,H,W) is already
    on the device.
    """
    size = tuple(image.shape[-2:])
    times: list[dict[str, list[float]]] = [{"network_ms": [], "post_ms": []} for _ in models]
    with torch.inference_mode():
        for run in range(-WARM_UP, runs):
            for model, spent in zip(models, times, strict=True):
                started = _now(image.device)
                logits = model(image)
                between = _now(image.device)
                label_map(logits.float(), size, size)
                ended = _now(image.device)
                if run >= 0:
                    spent["network_ms"].append(1e3 * (between - started))
                    spent["post_ms"].append(1e3 * (ended - between))
    return [
        {
            key: {f"p{quantile}": float(np.percentile(values, quantile)) for quantile in (50, 90)}
            for key, values in spent.items()
        }
        for spent in times
    ]


def _now(device: torch.device) -> float:
    """The time [s], after waiting until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(model: Segmenter, image: Tensor) -> int:
    """Largest number of bytes held during one pass, with post-processing: the model's tensors, the image, all results.

    Measured by `max_memory_allocated` on CUDA, and on the CPU by `LiveTensors`, which misses the memory that operations
    use internally.
    """
    size = tuple(image.shape[-2:])
    held = [*model.state_dict().values(), image]
    own = sum(tensor.numel() * tensor.element_size() for tensor in held)
    live = LiveTensors(held)
    on_cuda = image.device.type == "cuda"
    before = torch.cuda.memory_allocated(image.device) if on_cuda else 0
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(image.device)
    with torch.inference_mode(), nullcontext() if on_cuda else live:
        label_map(model(image).float(), size, size)
    return own + (torch.cuda.max_memory_allocated(image.device) - before if on_cuda else live.peak)


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all live storages that operations returned; `peak`: their maximum. `held` is not counted."""

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, list | tuple) else [output]:
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata  # a view or an in-place operation returns a known storage
        if address in self.known:
            return
        self.known.add(address)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, address, storage.nbytes())

    def _free(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


def _heading(column: dict[str, Any]) -> str:
    kind = CLASSIFIERS.get(column["classifier"])
    return column["classifier"] + (f" ({kind.NOTE})" if kind and kind.NOTE else "")


def print_profile(report: dict[str, Any]) -> None:
    """Prints the columns side by side on stdout."""
    columns = report["columns"]

    def row(label: str, cell: Callable[[dict[str, Any]], str]) -> tuple[str, ...]:
        return (label, *(cell(column) for column in columns))

    def timing(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda column: f"{column[key]['p50']:.2f} / {column[key]['p90']:.2f}"

    rows = [
        row("parameters [M]", lambda column: f"{column['parameters'] / 1e6:.4f}"),
        row("  without training-only ones [M]", lambda column: f"{column['parameters_deployed'] / 1e6:.4f}"),
        row(f"GMACs, {EVERY_OPERATION}", lambda column: f"{column['gmacs'][EVERY_OPERATION]:.3f}"),
        row(f"GMACs, {MODULES_ONLY}", lambda column: f"{column['gmacs'][MODULES_ONLY]:.3f}"),
        row("network, p50 / p90 [ms]", timing("network_ms")),
        row("upsampling and arg-max, p50 / p90 [ms]", timing("post_ms")),
        row("peak memory, with weights [MiB]", lambda column: f"{column['peak_mib']:.1f}"),
    ]
    if any(column["memory_mib"] for column in columns):
        rows.append(row("memory of pixels, in training only [MiB]", lambda column: f"{column['memory_mib']:.1f}"))
    height, width = report["size"]
    title = f"{report['model']}, {report['classes']} classes, {height}x{width} (height x width), {report['device']}"
    print_table(("", *map(_heading, columns)), rows, title)
    for name, meaning in COUNTINGS.items():
        echo(f"{name}: {meaning}")
    echo(f"{report['runs']} timed passes each, in turn; {report['threads']} CPU threads; torch {report['torch']}")
