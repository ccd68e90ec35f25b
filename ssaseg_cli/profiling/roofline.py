"""Roofline arithmetic: the work of a pass, and the least time that this machine needs for it.

Each operation takes at least its multiply-accumulates divided by the speed of a matrix product, and at least its bytes
(weights and activations, read and written once) divided by the speed of a copy inside the cache. Both speeds are
measured in this process. "products" counts only convolutions and matrix products. All else could be fused into them, so
this is the best that a compiler may reach. PyTorch's fused attention counts with its bytes alone where the flop counter
does not know it: then the bound is too low, never too high.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ssaseg.cli.profiling.latency import now
from ssaseg.cli.profiling.stages import Pass, precision_of
from ssaseg.cli.scoring.engines import TorchEngine
from ssaseg.models.fast import has_bfloat16

CPU = torch.device("cpu")
# Numbers in a copy that stays in the cache: of a CPU's core, and of a GPU, where a small copy only waits for its start.
CACHED = {"cpu": 2**18, "cuda": 2**21}
SIDES = {"cpu": 1024, "cuda": 8192}  # of the square matrices of a large product


class Work(TorchDispatchMode):
    """Collects multiply-accumulates and bytes of each operation that computes; views are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[int, int]] = []  # convolutions and matrix products
        self.others: list[tuple[int, int]] = []
        self.macs: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = list(tensors((args, kwargs)))
        old = {tensor.untyped_storage().data_ptr() for tensor in given}
        made = list(tensors(result))
        inplace = func._schema.is_mutable
        if func.overloadpacket in flop_registry:
            count = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result) // 2
            self.macs[func.overloadpacket.__name__] += count
            self.products.append((count, sum(map(size_of, given + made))))
        elif inplace or any(tensor.untyped_storage().data_ptr() not in old for tensor in made):
            self.others.append((0, sum(map(size_of, given + made))))
        return result


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor; elements that an expanded tensor repeats count once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def reached(rounds: int = 20, device: torch.device = CPU) -> dict[str, float]:
    """Speeds of this process: matrix products [operations/s], copies inside and outside the cache [bytes/s]."""

    def best(work: Callable[[], object], times: int) -> float:
        found = []
        for _ in range(rounds):
            start = now(device)
            for _ in range(times):
                work()
            found.append((now(device) - start) / times)
        return min(found)

    def product(dtype: torch.dtype) -> float:
        # Emulated bfloat16 is a hundred times slower: the full size would take minutes, for a bound out of reach.
        side = SIDES[device.type] if dtype == torch.float32 or has_bfloat16(device) else 128
        square = torch.randn(side, side, device=device).to(dtype)
        # In bfloat16 the speed depends on which operand is transposed, and the faster one is not always the same.
        return 2 * side**3 / min(best(lambda: square @ square, 3), best(lambda: square @ square.T, 3))

    def copy(count: int, times: int) -> float:
        source = torch.ones(count, device=device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / best(lambda: target.copy_(source), times)

    return {
        "float32 operations/s": product(torch.float32),
        "bfloat16 operations/s": product(torch.bfloat16),
        "cache bytes/s": copy(CACHED[device.type], 200),
        "memory bytes/s": copy(2**26, 1),
    }


def least(operations: Sequence[tuple[int, int]], pace: float, copy: float) -> float:
    """The least time [ms] of operations (multiply-accumulates, bytes), at speeds of products and of copies."""
    return 1e3 * sum(max(2 * macs / pace, moved / copy) for macs, moved in operations)


@torch.no_grad()
def roofline(model: nn.Module, images: Tensor, speed: Mapping[str, float]) -> dict[str, Any]:
    """Work of one pass of `model` over images (N,C,H,W), and its least time [ms]: for all operations, and for products
    only. `speed`: what `reached` returns.
    """
    work = Work()
    with work:
        model(images)
    copy = speed["cache bytes/s"]
    weights = sum(p.nbytes for name, p in model.named_parameters() if "classifier.teacher." not in name)
    return {
        "GMAC": {name: macs / 1e9 for name, macs in work.macs.items()},
        "operations": {"products": len(work.products), "others": len(work.others)},
        "MB": {
            "weights": weights / 1e6,
            "products, with weights": sum(moved for _, moved in work.products) / 1e6,
            "others": sum(moved for _, moved in work.others) / 1e6,
        },
        "at least [ms]": {
            "all, float32": least(work.products + work.others, speed["float32 operations/s"], copy),
            "products, float32": least(work.products, speed["float32 operations/s"], copy),
            # Half the bytes: the work was counted in float32.
            "products, bfloat16": least(work.products, speed["bfloat16 operations/s"], 2 * copy),
        },
    }


@torch.no_grad()  # in inference mode, convolutions would not come as the operations that the flop counter knows
def stage_bounds(each: Pass, speed: Mapping[str, float], measured: Mapping[str, float]) -> list[dict[str, Any]]:
    """Work and least times of the network's stages; the last row: all together. Empty if another runtime computes.

    measured: times [ms] of the stages. Keys: `gmacs`; `operations`; `mb`: bytes of all operations; `least_ms`: for all
    operations; `products_ms`: for products only; `ms`: measured; `ratio`: measured by `least_ms`.
    """
    if not isinstance(each.engine, TorchEngine):
        return []
    image, device = each.picture.image, each.engine.device
    value: Any = each.picture.prepare(image, each.metadata, device)
    rows, sums = [], Work()
    half = each.engine.dtype == torch.bfloat16
    pace = speed["bfloat16 operations/s" if half else "float32 operations/s"]
    with precision_of(each.engine):
        for name, step in each.steps:
            work = Work()
            with work:
                value = step(value)
            rows.append(_bound(name, work, pace, speed["cache bytes/s"], measured[name]))
            sums.products += work.products
            sums.others += work.others
    return [*rows, _bound("all", sums, pace, speed["cache bytes/s"], sum(row["ms"] for row in rows))]


def _bound(name: str, work: Work, pace: float, copy: float, measured: float) -> dict[str, Any]:
    everything = work.products + work.others
    bound = least(everything, pace, copy)
    return {
        "stage": name,
        "gmacs": sum(macs for macs, _ in everything) / 1e9,
        "operations": len(everything),
        "mb": sum(moved for _, moved in everything) / 1e6,
        "least_ms": bound,
        "products_ms": least(work.products, pace, copy),
        "ms": measured,
        "ratio": measured / bound if bound else None,
    }
