"""What a training step spends its time on, and what bounds it: for step.py --profile.

The stages of a step are timed with a wait after each; a normal step has no such waits. "products" are convolutions and
matrix products. Estimates: the step's multiply-accumulates divided by the speed of a large product on this machine, and
the bytes of all operations divided by the speed of a large copy. They are not bounds: caches save bytes, and the speed
of a machine varies. On a GPU, a step is bound by launches if the GPU is idle for more than a tenth of it.
"""

import time
from collections import defaultdict
from itertools import pairwise
from typing import Any

import torch
from step_sides import Side
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ssaseg.cli.profiling.roofline import Work

ROUNDS = 5
PRODUCTS = ("gemm", "conv", "cutlass", "xmma", "nvjet", "addmm", "bmm", "::mm", "fprop", "dgrad", "wgrad")


def profile_of(side: Side) -> dict[str, Any]:
    """Times of the stages and operators of one side, and what bounds it."""
    for _ in range(2):
        side.step()
    kinds, top, busy, launched = operators(side)
    host, whole = times(side)
    found: dict[str, Any] = {
        "step [ms]": whole,
        "parts [ms]": stages(side),
        "kinds [ms]": kinds,
        "top [ms]": top,
    }
    if not side.name.endswith("compiled"):  # a compiled network is one operation to the counter
        found["estimates [ms]"] = estimates(side)
    if side.device.type == "cuda":
        found |= {"queued after [ms]": host, "GPU busy [ms]": busy, "kernels": launched}
    found["bound by"] = bound_by(found)
    return found


def stages(side: Side) -> dict[str, float]:
    """Median [ms] of each stage; the step is split at the classifier's feature."""
    spent: dict[str, list[float]] = defaultdict(list)
    images, labels = side.feed()
    for turn in range(-1, ROUNDS):
        marks = [("", clock(side))]
        side.optimizer.zero_grad(set_to_none=True)
        feature = side.feature(images)
        marks.append(("network forward", clock(side)))
        leaf = feature.detach().requires_grad_()
        losses = side.losses_of(leaf, labels)
        marks.append(("losses forward", clock(side)))
        torch.stack(list(losses.values())).sum().backward()
        marks.append(("losses backward", clock(side)))
        feature.backward(leaf.grad)
        marks.append(("network backward", clock(side)))
        side.optimizer.step()
        marks.append(("optimiser", clock(side)))
        if turn >= 0:
            for (_, start), (name, stop) in pairwise(marks):
                spent[name].append(1e3 * (stop - start))
    return {name: sorted(each)[len(each) // 2] for name, each in spent.items()}


def clock(side: Side) -> float:
    side.wait()
    return time.perf_counter()


def times(side: Side) -> tuple[float, float]:
    """Time [ms] until the program has queued a step, and until the step is done."""
    queued, done = [], []
    for _ in range(ROUNDS):
        start = clock(side)
        side.step()
        queued.append(time.perf_counter() - start)
        done.append(clock(side) - start)
    return 1e3 * sorted(queued)[ROUNDS // 2], 1e3 * sorted(done)[ROUNDS // 2]


def operators(side: Side) -> tuple[dict[str, float], dict[str, float], float, int]:
    """Of a step: time [ms] of products and others, of the ten slowest operators or kernels, and of all; the number."""
    cuda = side.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        side.step()
        side.wait()
    spent: dict[str, float] = defaultdict(float)
    count = 0
    for event in found.events() or ():
        if cuda and event.device_type == DeviceType.CUDA:
            spent[event.name] += event.time_range.elapsed_us() / 1e3
            count += 1
        elif not cuda and event.device_type == DeviceType.CPU:
            spent[event.name] += event.self_cpu_time_total / 1e3
            count += 1
    top = sorted(spent.items(), key=lambda item: -item[1])
    kinds = {"products": 0.0, "others": 0.0}
    for name, value in top:
        kinds["products" if any(word in name.lower() for word in PRODUCTS) else "others"] += value
    return kinds, {name[:90]: value for name, value in top[:10]}, sum(spent.values()), count


def estimates(side: Side) -> dict[str, float]:
    """Time [ms] of a step's arithmetic and of its bytes, at the speeds of a large product and a large copy."""
    work = Work()
    with work:
        side.step()
    side.wait()
    macs = sum(count for count, _ in work.products)
    moved = sum(size for _, size in work.products + work.others)
    dtype = torch.float32 if side.case.amp == "off" else torch.bfloat16
    wide, long = (8192, 1 << 28) if side.device.type == "cuda" else (1024, 1 << 26)
    square = torch.randn(wide, wide, device=side.device).to(dtype)
    source = torch.ones(long, device=side.device)
    target = torch.empty_like(source)
    product, copy = (best(side, work) for work in (lambda: square @ square, lambda: target.copy_(source)))
    return {
        "arithmetic": 1e3 * macs * product / wide**3,
        "bytes": 1e3 * moved * copy / (2 * source.nbytes),
        "GMAC": macs / 1e9,
        "GB": moved / 1e9,
        "operations": len(work.products) + len(work.others),
    }


def best(side: Side, work: Any) -> float:
    """Seconds of the fastest of ten calls."""
    found = []
    for _ in range(10):
        start = clock(side)
        work()
        found.append(clock(side) - start)
    return min(found)


def bound_by(found: dict[str, Any]) -> str:
    """What bounds the step, as text."""
    if "GPU busy [ms]" in found and found["GPU busy [ms]"] < 0.9 * found["step [ms]"]:
        idle = 1 - found["GPU busy [ms]"] / found["step [ms]"]
        return f"launches: the GPU is idle for {idle:.0%} of the step"
    kinds = found["kinds [ms]"]
    share = kinds["others"] / max(sum(kinds.values()), 1e-9)
    if share > 0.5:
        return f"bandwidth: {share:.0%} of the computing time is not in products"
    return f"arithmetic: {1 - share:.0%} of the computing time is in products"


def show_profile(found: dict[str, dict[str, Any]]) -> None:
    """Prints a paragraph per side."""
    for name, result in found.items():
        whole = sum(result["parts [ms]"].values())
        shares = ", ".join(f"{part} {value / whole:.0%}" for part, value in result["parts [ms]"].items())
        print(f"  profile of {name}: {result['step [ms]']:.1f} ms; {shares}")
        if "estimates [ms]" in result:
            guess = result["estimates [ms]"]
            print(
                f"    estimates: arithmetic {guess['arithmetic']:.1f} ms ({guess['GMAC']:.0f} GMAC), "
                f"bytes {guess['bytes']:.1f} ms ({guess['GB']:.1f} GB in {guess['operations']} operations)"
            )
        if "kernels" in result:
            print(
                f"    {result['kernels']} kernels, GPU busy {result['GPU busy [ms]']:.1f} ms, queued after "
                f"{result['queued after [ms]']:.1f} ms"
            )
        print(f"    bound by {result['bound by']}")
        print(
            "    slowest: "
            + "; ".join(f"{key[:40]} {value:.1f}" for key, value in list(result["top [ms]"].items())[:6])
        )
