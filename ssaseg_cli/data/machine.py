"""What fits the machine that `data init` runs on: network, batch, precision and number of steps of a recipe."""

import functools
import time
from typing import NamedTuple

from ssaseg.cli.console import about
from ssaseg.cli.device import calm_allocator, count_cores
from ssaseg.cli.weights.fetching import find
from ssaseg.cli.weights.known import KNOWN, starts_of

# Passes over the training images, and limits of the number of steps for data sets of very few or very many images.
PASSES, FEWEST_STEPS, MOST_STEPS = 200, 2000, 80000
# On a CPU: a first result in hours, not in days; from ImageNet weights in less.
CPU_PASSES, CPU_FEWEST = 60, 1000
STARTED_PASSES, STARTED_FEWEST = 25, 500
QUICK = "lite0"  # proposed where its ImageNet weights are here: on CamVid they gain 30 points in 500 steps
MANY_CORES = 16  # of a CPU that can train the larger network
GAIN = 1.2  # how many times as fast bf16 must be on a CPU, which gives up digits for it

# Of the steps that are measured: few pixels, so that `data init` stays quick. The number of classes changes little.
IMAGES, SIDE, CLASSES = 4, 96, 20
SLOW = 1.0  # seconds of a step, after which no more are measured: the machine is busy


class Fit(NamedTuple):
    """What a recipe says for this machine. Each `why` is a comment of the recipe."""

    model: str
    why_model: str
    batch: int
    amp: str
    why_amp: str
    steps: int
    workers: int
    cost: str  # of the whole training


def fit_machine(model: str | None, classifier: str, images: int, crop: list[int]) -> Fit:
    """model: the network that the user names; None: it is chosen. images: for training. crop: height and width."""
    import torch

    from ssaseg.models.fast import has_bfloat16

    started = model is None and has_start()
    cores = count_cores()
    batch = 16 if images >= 16 else 8
    if torch.cuda.is_available():
        whole = torch.cuda.is_bf16_supported(including_emulation=False)
        amp, why = ("bf16", "this GPU has it") if whole else ("fp16", "this GPU has no bf16")
        steps = _steps(PASSES, images, batch, FEWEST_STEPS)
        cost = f"chosen for one {torch.cuda.get_device_name()}, time not measured"
        why_model = "its ImageNet weights are here" if started else ""
        return Fit(
            model or (QUICK if started else "seaformer_b"), why_model, batch, amp, why, steps, min(cores, 4), cost
        )
    here = f"this CPU ({cores} core{'s' * (cores > 1)})"
    batch = 8
    steps = _steps(CPU_PASSES, images, batch, CPU_FEWEST)
    workers = 1 if cores <= 4 else 2
    if model is not None:  # perhaps so large that even a short step would take long
        why = "train.amp=bf16 is faster on some CPUs"
        return Fit(model, "", batch, "off", why, steps, workers, f"chosen for {here}, time not measured")
    model = "seaformer_b" if cores >= MANY_CORES else "seaformer_s"
    why_model = f"chosen for {here}; larger: seaformer_b"
    if started:
        model, why_model = QUICK, "its ImageNet weights are here: a few passes over the data are enough"
        steps = _steps(STARTED_PASSES, images, batch, STARTED_FEWEST)
    measured = classifier if classifier in ("linear", "ssa") else "linear"  # the others keep a large memory of pixels
    seconds = measure_step(model, measured, "off")
    amp, why = "off", "this CPU has no bf16 of its own"
    if seconds > SLOW:
        why = "train.amp=bf16 is faster on some CPUs; this one was too busy to measure it"
    elif has_bfloat16(torch.device("cpu")):
        gain = seconds / (short := measure_step(model, measured, "bf16"))
        amp, seconds = ("bf16", short) if gain >= GAIN else ("off", seconds)
        why = f"measured here: bf16 is {gain:.1f} times as fast as off"
    pixels = batch * crop[0] * crop[1] / (IMAGES * SIDE**2)
    cost = f"{about(seconds * pixels * steps)} on {here}, by a short step that was measured"
    return Fit(model, why_model, batch, amp, why, steps, workers, cost)


def has_start() -> bool:
    """Whether ImageNet weights for the network `QUICK` are here."""
    return any(find(KNOWN[name]) for name in starts_of(QUICK))


def _steps(passes: int, images: int, batch: int, fewest: int) -> int:
    return min(max(passes * images // batch // 100 * 100, fewest), MOST_STEPS)


@functools.cache
def measure_step(model: str, classifier: str, amp: str) -> float:
    """Seconds of a training step of `IMAGES` images of `SIDE` x `SIDE` pixels on the CPU: the second of two, or the
    first if that is slow.
    """
    import torch

    from ssaseg.models import build_model

    calm_allocator()
    seconds = 0.0
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = build_model(model, CLASSES, classifier).train()
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        images = torch.randn(IMAGES, 3, SIDE, SIDE)
        labels = torch.randint(CLASSES, (IMAGES, SIDE // 16, SIDE // 16)).byte()
        labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)
        for _ in range(2):
            started = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp == "bf16"):
                losses = network(images, labels)
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - started
            if seconds > SLOW:
                break
    return seconds
