"""Roofline arithmetic of networks.py: the work of a pass, and the least time that this machine needs for it.

Each operation of the eager network takes at least its multiply-accumulates divided by the speed of a matrix product,
and at least its bytes (weights and activations, read and written once) divided by the speed of a copy inside the cache.
"products" counts only convolutions and matrix products. All else could be fused into them, so this is the best that a
compiler may reach.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from network_sides import Case, our_network, seconds
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ssaseg.models.fast import has_bfloat16


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
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor; elements that an expanded tensor repeats count once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def reached(rounds: int = 20) -> dict[str, float]:
    """Speeds of this process: matrix products [operations/s], copies inside and outside the cache [bytes/s]."""

    def best(work: Callable[[], object], times: int) -> float:
        return min(seconds(lambda: [work() for _ in range(times)])[0] / times for _ in range(rounds))

    def product(dtype: torch.dtype) -> float:
        # Emulated bfloat16 is a hundred times slower: the full size would take minutes, for a bound out of reach.
        side = 1024 if dtype == torch.float32 or has_bfloat16(torch.device("cpu")) else 128
        square = torch.randn(side, side).to(dtype)
        # In bfloat16 the speed depends on which operand is transposed, and the faster one is not always the same.
        return 2 * side**3 / min(best(lambda: square @ square, 3), best(lambda: square @ square.T, 3))

    def copy(count: int, times: int) -> float:
        source = torch.ones(count)
        target = torch.empty_like(source)
        return 2 * source.nbytes / best(lambda: target.copy_(source), times)

    return {
        "float32 operations/s": product(torch.float32),
        "bfloat16 operations/s": product(torch.bfloat16),
        "cache bytes/s": copy(2**18, 200),
        "memory bytes/s": copy(2**26, 1),
    }


@torch.no_grad()
def roofline(case: Case, speed: dict[str, float]) -> dict[str, Any]:
    """Work of one eager pass, and its least time [ms]: for all operations, and for products only."""
    model, images, work = our_network(case), case.images(), Work()
    with work:
        model(images)

    def least(operations: list[tuple[int, int]], dtype: str) -> float:
        shrink = 0.5 if dtype == "bfloat16" else 1.0
        pace, copy = speed[f"{dtype} operations/s"], speed["cache bytes/s"]
        return 1e3 * sum(max(2 * macs / pace, shrink * moved / copy) for macs, moved in operations)

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
            "all, float32": least(work.products + work.others, "float32"),
            "products, float32": least(work.products, "float32"),
            "products, bfloat16": least(work.products, "bfloat16"),
        },
    }
