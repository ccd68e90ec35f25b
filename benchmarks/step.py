"""One training step of SeaFormer-B with ssa: against linear, the plain formulation of its losses, and the rivals.

    python benchmarks/step.py              # writes benchmarks/results/step.json
    python benchmarks/step.py --profile    # also what the step spends its time on, and what bounds it
    python benchmarks/step.py --smoke      # small and quick, writes nothing

Batch 16 in bfloat16 on a GPU if there is one, else batch 4 in float32 on a CPU with 2 threads; images of 512×512, with
150 and with 11 classes. A step is forward, losses, backward and the update of a fused AdamW. It does not include what
else `ssaseg train` does: preparing the batch (only two sides do), the gradient's norm, the guard, averages. The sides
are in step_sides.py. They run in turn; a time is the median of the rounds, a ratio the median of the rounds' ratios.
"processor" is the working time of all threads, which depends less on other programs. Before that, ssa and plain must
agree to 1e-4 in float32, in every loss and in the gradient of all parameters.

The peak of each side is that of a new process. On a GPU it is PyTorch's `max_memory_allocated`, with network and
optimiser; on a CPU, the resident memory that the step adds in a process that has already done a small step.
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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before PyTorch, as the commands do

import torch
from losses import resident
from networks import processor, rounded
from step_profile import profile_of, show_profile
from step_sides import CPU_SIDES, CUDA_SIDES, RIVALS, Case, Side

from ssaseg.cli.device import select_device

RESULTS = Path(__file__).parent / "results" / "step.json"
TOLERANCE = 1e-4
GOALS = {"ssa/linear": "at most 1.25", "plain/ssa": "at least 3", "plain/ssa peak": "at least 3"}
CLASSES = (150, 11)
MIB = 1 << 20


# ---- the same results --------------------------------------------------------------------------------------------


def apart(case: Case) -> dict[str, float]:
    """Relative differences of ssa and plain in float32: the largest of a loss, and that of the whole gradient."""
    found = {}
    for name in ("ssa", "plain"):
        side = Side(name, replace(case, amp="off", batch=min(case.batch, 8)))
        torch.manual_seed(1)  # so that the same channels and branches are dropped
        losses = side.losses(side.images, side.labels)
        torch.stack(list(losses.values())).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in side.model.parameters() if p.grad is not None])
        found[name] = {key: value.item() for key, value in losses.items()}, gradient
    (ours, ours_gradient), (plain, plain_gradient) = found.values()
    if ours.keys() != plain.keys() or ours_gradient.shape != plain_gradient.shape:
        raise SystemExit(f"the sides have different losses or parameters: {sorted(ours)}, {sorted(plain)}")
    return {
        "loss": max(abs(ours[name] / value - 1) for name, value in plain.items()),
        "gradient": ((ours_gradient - plain_gradient).norm() / plain_gradient.norm()).item(),
    }


# ---- memory ------------------------------------------------------------------------------------------------------


def peak_here(name: str, case: Case) -> float:
    """Peak of a step [MiB], see the module's docstring. Call it in a new process."""
    if case.device == "cuda":
        side = Side(name, case)
        for _ in range(3):
            side.step()
        side.wait()
        return torch.cuda.max_memory_allocated() / MIB
    side = Side(name, case)
    # A small batch first sets up threads, kernels and the optimiser's state, so that they do not count.
    whole, small = (side.images, side.labels), Side(name, replace(case, image=64, batch=2))
    side.feed = lambda: (small.images, small.labels)
    side.step()
    side.optimizer.zero_grad(set_to_none=True)
    side.feed = lambda: whole
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    side.step()
    return resident("VmHWM") - before


def in_own_process(name: str, case: Case) -> tuple[float | None, str]:
    """The peak [MiB] and ""; or None and the reason for the failure."""
    words = [sys.executable, __file__, "--peak-of", name, "--case", json.dumps(asdict(case))]
    result = subprocess.run(words, capture_output=True, text=True)
    if result.returncode == 0:
        return float(result.stdout), ""
    return None, (result.stderr.strip().splitlines() or ["killed"])[-1][:300]


# ---- time --------------------------------------------------------------------------------------------------------


def measure(case: Case, names: tuple[str, ...], smoke: bool = False) -> dict[str, Any]:
    """Runs all sides in turn: times, peaks, their ratios. A side that fails is listed with the reason.

    smoke: only the first side has a process of its own for its peak, as PyTorch takes seconds to import.
    """
    peaks: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in names:
        own = not smoke or name == names[0]
        peak, why = in_own_process(name, case) if own else (peak_here(name, case), "")
        if peak is None:
            missing[name] = why
        else:
            peaks[name] = peak
    sides = {name: Side(name, case) for name in peaks}
    seconds: dict[str, list[float]] = defaultdict(list)
    processor: dict[str, list[float]] = defaultdict(list)
    for turn in range(-2 if case.device == "cuda" else -1, case.rounds):  # the first turns tune, compile and warm up
        for name, side in sides.items():
            side.wait()
            start, worked = time.perf_counter(), time.process_time()
            for _ in range(case.steps):
                side.step()
            side.wait()
            if turn >= 0:
                seconds[name].append((time.perf_counter() - start) / case.steps)
                processor[name].append((time.process_time() - worked) / case.steps)
    ratios = {}
    for slow, quick in pairs_of(seconds):
        ratios[f"{slow}/{quick}"] = statistics.median(a / b for a, b in zip(seconds[slow], seconds[quick], strict=True))
        ratios[f"{slow}/{quick} peak"] = peaks[slow] / max(peaks[quick], 1e-9)
    return {
        "case": asdict(case),
        "median [ms]": {name: 1e3 * statistics.median(times) for name, times in seconds.items()},
        "all [ms]": {name: [1e3 * each for each in times] for name, times in seconds.items()},
        "processor, all threads [ms]": {name: 1e3 * statistics.median(times) for name, times in processor.items()},
        "peak [MiB]": peaks,
        "ratios": ratios,
        "not measured": missing,
    }


def pairs_of(names: Any) -> list[tuple[str, str]]:
    """Pairs whose ratio is shown: ssa and linear in each form; rivals and linear; plain, and eager ssa, with each form
    of ssa.
    """
    ours = [name for name in names if name.startswith("ssa")]
    found = [(name, name.replace("ssa", "linear")) for name in ours if name.replace("ssa", "linear") in names]
    found += [(name, "linear") for name in names if name in RIVALS and "linear" in names]
    found += [("plain", name) for name in ours if "plain" in names]
    return found + [("ssa", name) for name in ours if "ssa" in names and name != "ssa"]


def show(result: dict[str, Any]) -> None:
    case = result["case"]
    print(
        f"{case['model']}, batch {case['batch']} of {case['image']}×{case['image']}, {case['classes']} classes, "
        f"{case['device']}, amp {case['amp']}"
    )
    for name, spent in result["median [ms]"].items():
        spread = result["all [ms]"][name]
        print(
            f"  {name:22}{spent:9.1f} ms ({min(spread):.1f} to {max(spread):.1f}), "
            f"processor {result['processor, all threads [ms]'][name]:9.1f} ms, "
            f"peak {result['peak [MiB]'][name]:8.0f} MiB"
        )
    for name, why in result["not measured"].items():
        print(f"  {name:22}not measured: {why}")
    for name, ratio in result["ratios"].items():
        print(f"  {name:30}{ratio:6.2f}{verdict(name, ratio)}")


def verdict(what: str, ratio: float) -> str:
    if what not in GOALS:
        return ""
    bound = float(GOALS[what].split()[-1])
    met = ratio <= bound if GOALS[what].startswith("at most") else ratio >= bound
    return f"  (goal {GOALS[what]}: {'met' if met else 'MISSED'})"


# ---- the command -------------------------------------------------------------------------------------------------


def main() -> int:
    """Measures, prints, writes; returns 1 if the sides disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small and quick; writes nothing")
    parser.add_argument(
        "--profile", action="store_true", help="also what the step spends its time on, and what bounds it"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--amp", choices=("off", "bf16"), help="default: bf16 on a GPU, off on a CPU")
    parser.add_argument(
        "--model", default="seaformer_b", help="a network whose decoder returns one feature (default %(default)s)"
    )
    parser.add_argument("--batch", type=int, help="default: 16 on a GPU, 4 on a CPU")
    parser.add_argument("--classes", type=int, action="append", help=f"repeatable (default {CLASSES})")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="threads on a CPU (default %(default)s)")
    parser.add_argument("--sides", action="append", help="only these of step_sides.py; repeatable")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = select_device(options.device or "auto").type
    torch.backends.cudnn.benchmark = True  # as in training
    if options.peak_of:
        case = Case(**options.case)
        torch.set_num_threads(case.threads)
        print(peak_here(options.peak_of, case))
        return 0
    case = case_of(options, device)
    torch.set_num_threads(case.threads)
    results, agree = [], True
    for classes in options.classes or ((11,) if options.smoke else CLASSES):
        this = replace(case, classes=classes)
        difference = apart(this)
        agree &= max(difference.values()) < TOLERANCE
        print(f"{classes} classes, ssa and plain apart: " + ", ".join(f"{k} {v:.1e}" for k, v in difference.items()))
        # Forms that compile take minutes, and their results do not depend on the number of classes.
        forms = device == "cuda" and (options.smoke or classes == CLASSES[0])
        sides = tuple(options.sides or (CUDA_SIDES if forms else CPU_SIDES))
        sides = tuple(side for side in sides if not (options.smoke and "compiled" in side))
        result = {**measure(this, sides, options.smoke), "apart, relative": difference}
        show(result)
        if options.profile:
            names = [name for name in ("ssa", "linear", "plain", "ssa compiled") if name in result["median [ms]"]]
            result["profile"] = {name: profile_of(Side(name, this)) for name in names}
            show_profile(result["profile"])
        results.append(result)
    if not options.smoke:
        write(device, results)
    print("the sides agree" if agree else f"the sides DISAGREE by more than {TOLERANCE}")
    return 0 if agree else 1


def case_of(options: argparse.Namespace, device: str) -> Case:
    """The case that the options describe; the number of classes is set later."""
    if options.smoke:
        GOALS.clear()  # they are for large images
        return Case(device, 4, 11, 64, "seaformer_t", options.amp or "off", 1, 2)
    batch, amp, steps = (16, "bf16", 10) if device == "cuda" else (4, "off", 1)
    return Case(
        device,
        options.batch or batch,
        model=options.model,
        amp=options.amp or amp,
        threads=options.threads,
        rounds=options.rounds,
        steps=steps,
    )


def write(device: str, results: list[dict[str, Any]]) -> None:
    """Writes the results of `device`; keeps those of the other device."""
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    stored[device] = {
        "command": "python benchmarks/step.py " + " ".join(sys.argv[1:]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "on": processor(device),
        "load average": os.getloadavg()[0],  # above the number of cores: other programs ran, too
        "cases": results,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rounded(stored), indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
