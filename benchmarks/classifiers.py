"""The classifiers alone, on features at a quarter of the resolution: time, peak memory, and its growth with the pixels.

    python benchmarks/classifiers.py            # writes benchmarks/results/classifiers.json
    python benchmarks/classifiers.py --smoke    # small and quick, writes nothing

One image, 150 classes, 2 threads, float32, features of 256 and 512 channels as SegFormer and UPerNet make them. The
images have 512², 768² and 1024² pixels. `forward`: in evaluation, without gradients. `step`: losses on labels of the
image's size, and the backward pass. A peak is that of a new process, above what it holds with its input. Growth is the
memory for each further position of the feature: memory is linear if the growth from 768² to 1024² is not above that
from 512² to 768².
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from losses import resident
from torch import Tensor, nn

from ssaseg.models.classifiers.linear import LinearClassifier
from ssaseg.models.classifiers.ssa import SSAClassifier

RESULTS = Path(__file__).parent / "results" / "classifiers.json"
KINDS = {"linear": LinearClassifier, "ssa": SSAClassifier}
WORKS = ("forward", "step")
STRIDE = 4
THREADS = 2
LIMIT = 1.1  # of the ratio of growths; above it, memory is not called linear


def inputs(channels: int, side: int, classes: int) -> tuple[Tensor, Tensor]:
    """Feature (1,C,side/4,side/4), channels last as decoders give it, and labels in patches of 32×32 pixels."""
    torch.manual_seed(0)
    feature = torch.randn(1, channels, side // STRIDE, side // STRIDE).relu()
    labels = torch.randint(0, classes, (1, side // 32, side // 32)).repeat_interleave(32, 1).repeat_interleave(32, 2)
    return feature.contiguous(memory_format=torch.channels_last), labels


def classifier_of(kind: str, channels: int, classes: int) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind](channels, classes, group=1)


def run(work: str, classifier: nn.Module, feature: Tensor, labels: Tensor) -> float:
    """One forward pass or training step [s]."""
    start = time.perf_counter()
    if work == "forward":
        with torch.no_grad():
            classifier.eval()(feature)
    else:
        sum(classifier.train().training_step(feature.requires_grad_(), labels).losses.values()).backward()
        feature.grad = None
    return time.perf_counter() - start


def peak(*words: str) -> float:
    """`peak_here` in a new process."""
    command = [sys.executable, __file__, "--peak-of", *words]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def peak_here(work: str, kind: str, channels: str, side: str, classes: str) -> float:
    """Memory [MiB] that the work needs in addition to its inputs."""
    classifier = classifier_of(kind, int(channels), int(classes))
    run(work, classifier, *inputs(int(channels), 64, int(classes)))  # sets up threads and kernels
    given = inputs(int(channels), int(side), int(classes))
    before = resident("VmRSS")
    run(work, classifier, *given)
    return max(resident("VmHWM") - before, 0.0)


def measure(
    channels: int, sides: tuple[int, ...], classes: int, rounds: int, smoke: bool = False
) -> list[dict[str, Any]]:
    """A row for each kind of work and classifier. At each size, the classifiers take turns.

    smoke: only the first row has processes of its own for its peaks, as PyTorch takes seconds to import.
    """
    seconds: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for side in sides:
        given = inputs(channels, side, classes)
        classifiers = {kind: classifier_of(kind, channels, classes) for kind in KINDS}
        for turn, work, kind in product(range(-1, rounds), WORKS, KINDS):  # the first warms up
            spent = run(work, classifiers[kind], *given)
            if turn >= 0:
                seconds[work, kind, side].append(spent)
    rows = []
    for work, kind in product(WORKS, KINDS):
        take = peak if not (smoke and rows) else peak_here
        peaks = [take(work, kind, *map(str, (channels, side, classes))) for side in sides]
        positions = [(side // STRIDE) ** 2 for side in sides]
        growth = [
            1024 * (peaks[k + 1] - peaks[k]) / (positions[k + 1] - positions[k]) for k in range(len(positions) - 1)
        ]
        times = [1e3 * statistics.median(seconds[work, kind, side]) for side in sides]
        rows.append(
            {
                "work": work, "classifier": kind, "channels": channels, "images": list(sides),
                "median [ms]": [round(each, 1) for each in times],
                "peak [MiB]": [round(each, 1) for each in peaks],
                "growth [KiB per position]": [round(each, 2) for each in growth],
            }
        )  # fmt: skip
    return rows


def main() -> int:
    """Measures, prints, writes; returns 1 if a peak grows faster than the pixels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small and quick; writes nothing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-of", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.peak_of:
        print(peak_here(*options.peak_of))
        return 0
    widths, sides, classes, rounds = (256, 512), (512, 768, 1024), 150, options.rounds
    if options.smoke:
        widths, sides, classes, rounds = (16,), (64,), 19, 1
    rows, linear = [], True
    for channels in widths:
        for row in measure(channels, sides, classes, rounds, options.smoke):
            rows.append(row)
            growth = row["growth [KiB per position]"]
            linear &= options.smoke or growth[-1] <= LIMIT * growth[0]
            print(
                f"{row['work']:8}{row['classifier']:7} C={channels}: images {row['images']}, ms {row['median [ms]']}, "
                f"peak MiB {row['peak [MiB]']}, growth KiB/position {growth}",
                flush=True,
            )
    if not options.smoke:
        head = {
            "command": f"python benchmarks/classifiers.py --rounds {rounds}",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "on": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
            "load average": round(os.getloadavg()[0], 2),
            "threads": THREADS,
        }
        RESULTS.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    if not options.smoke:  # it has one size
        print("memory grows no faster than the pixels" if linear else "memory grows FASTER than the pixels")
    return int(not linear)


if __name__ == "__main__":
    sys.exit(main())
