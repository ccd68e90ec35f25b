"""From low-resolution logits to the label map: `interpolate` + `argmax`, a running maximum over all classes, and ours.

    python benchmarks/labels.py                                          # writes benchmarks/results/labels.json
    python benchmarks/labels.py --checkpoint X.safetensors --images DIR  # the logits of a trained model as well
    python benchmarks/labels.py --smoke                                  # small and quick, writes nothing

One bilinear step from 64×64 to 512×512, and a second one to 683×512 (the network's input and an image of another size),
150 classes, with 1 and 2 threads; also on a GPU if there is one. All sides run in turn and must agree: where labels
differ, the logits of the two classes may differ only by float32 rounding. The project has no model of 150 classes with
trained weights, so its logits are generated as `trained_like` says. Their figures (margins, roughness, candidates) are
printed beside those of the checkpoint. The second input is white noise, the worst case.

Roofline: the bytes that must be moved and the operations that must be done, divided by the speed of a copy and of a
matrix product in this process. The maps of the plain side do not fit into a cache; those of the other sides do. Ours
takes much longer than its least time: it has so little to compute that most of its time goes into starting some hundred
small operations in PyTorch.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor
from torch.nn import functional as F

from ssaseg.cli.profiling.memory import LiveTensors
from ssaseg.cli.scoring.engines import TorchEngine
from ssaseg.datasets.colour import normalize
from ssaseg.datasets.transforms import test_image
from ssaseg.models import load_model
from ssaseg.models.labelling import cut_axis, find_candidates, label_map, running_maximum

RESULTS = Path(__file__).parent / "results" / "labels.json"
CLOSE = 1e-5  # of the largest logit: a difference that float32 rounding can cause
CPU = torch.device("cpu")
Size = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """What is measured: resizing of logits to the size of the network's input, `middle`, and to the image's `size`."""

    logits: str
    middle: Size
    size: Size
    threads: int
    device: str
    rounds: int


# ---- inputs ------------------------------------------------------------------------------------------------------


def trained_like(classes: int, side: int, seed: int) -> Tensor:
    """Logits (1,K,side,side) with smooth regions and clear winners, similar to those of a trained network.

    Each class is a Gaussian field (deviation 3) on an 8×8 grid, enlarged bicubically. Where it is the highest class, 4
    is added, smoothed by a 3×3 mean. White noise of deviation 0.3 is added to all.
    """
    generator = torch.Generator().manual_seed(seed)
    field = 3 * F.interpolate(torch.randn(1, classes, 8, 8, generator=generator), (side, side), mode="bicubic")
    winner = F.one_hot(field.argmax(1), classes).movedim(3, 1).float()
    winner = F.avg_pool2d(winner, 3, 1, 1, count_include_pad=False)
    return field + 4 * winner + 0.3 * torch.randn(field.shape, generator=generator)


def white_noise(classes: int, side: int, seed: int) -> Tensor:
    return torch.randn(1, classes, side, side, generator=torch.Generator().manual_seed(seed))


def model_logits(checkpoint: Path, folder: Path, count: int) -> tuple[list[Tensor], Size]:
    """Logits of `count` images, spread over a folder, and the size of the network's input; all images have one size."""
    model, metadata = load_model(checkpoint)
    model.eval()
    files = sorted(file for file in folder.iterdir() if file.suffix in {".jpg", ".jpeg", ".png"})
    logits, size = [], (0, 0)
    for file in files[:: max(len(files) // count, 1)][:count]:
        image = cv2.imread(str(file))
        resized = test_image(image, metadata["protocol"]["scale"], metadata["protocol"]["multiple"])
        with torch.inference_mode():
            pixels = normalize(torch.from_numpy(resized)[None], metadata["mean"], metadata["std"])
            final = TorchEngine(model, CPU).logits(pixels).final
        logits.append(final.clone())
        size = resized.shape[:2]
    return logits, size


def describe(logits: Tensor) -> dict[str, float]:
    """Figures of logits: their deviation, the winners' margins, the roughness (deviation of second differences)."""
    first, second = logits[0].flatten(1).topk(2, dim=0).values
    rough = (logits[..., 2:] - 2 * logits[..., 1:-1] + logits[..., :-2]).std()
    margins = (first - second).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return {"deviation": float(logits.std()), "rough": float(rough)} | dict(
        zip(("margin_p10", "margin_p50", "margin_p90"), margins, strict=True)
    )


# ---- the sides ---------------------------------------------------------------------------------------------------


def plain_maps(logits: Tensor, middle: Size, size: Size) -> Tensor:
    """(1,K,h,w) → (1,K,H,W). The second step is left out if it does not change the size."""
    for length in dict.fromkeys((middle, size)):
        logits = F.interpolate(logits, length, mode="bilinear", align_corners=False)
    return logits


def plain(logits: Tensor, middle: Size, size: Size) -> Tensor:
    """As in the official code, but without its softmax."""
    return plain_maps(logits, middle, size).argmax(dim=1)[0]


SIDES: dict[str, Callable[[Tensor, Size, Size], Tensor]] = {
    "plain": plain,
    "running": running_maximum,
    "ours": label_map,
}


def wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def peak(side: str, logits: Tensor, case: Case) -> int:
    """Largest number of bytes of all live tensors, without the logits."""
    live = LiveTensors([logits])
    with live:
        SIDES[side](logits, case.middle, case.size)
    return live.peak


def differences(logits: list[Tensor], case: Case) -> dict[str, dict[str, float]]:
    """For each side except plain: the share of pixels whose label differs, and the largest difference of their logits.

    The latter is relative to the largest logit.
    """
    found = {}
    for side in ("running", "ours"):
        share, apart = 0.0, 0.0
        for each in logits:
            maps = plain_maps(each, case.middle, case.size)[0]
            best, winner = maps.max(dim=0)
            labels = SIDES[side](each, case.middle, case.size).long()
            share += float((labels != winner).float().mean()) / len(logits)
            apart = max(apart, float((best - maps.gather(0, labels[None])[0]).max() / maps.abs().max()))
        found[side] = {"share_of_pixels": share, "logits_apart": apart}
    return found


# ---- roofline ----------------------------------------------------------------------------------------------------


@lru_cache
def speeds(device: str, threads: int) -> dict[str, float]:
    """Speeds of this process: a copy that fits no cache [bytes/s, read + written], a matrix product [operations/s]."""
    torch.set_num_threads(threads)
    big, square = torch.ones(2**26, device=device), torch.ones(2048, 2048, device=device)
    target = torch.empty_like(big)

    def best_of(work: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            wait(big)
            start = time.perf_counter()
            work()
            wait(big)
            times.append(time.perf_counter() - start)
        return min(times)

    return {
        "bytes_per_s": 2 * big.nbytes / best_of(lambda: target.copy_(big)),
        "operations_per_s": 2 * 2048**3 / best_of(lambda: square @ square),
    }


def roofline(logits: list[Tensor], case: Case, reached: dict[str, float]) -> dict[str, Any]:
    """Bytes and operations of one label map, and the least time they take [ms]; also candidates per window.

    Bytes: the plain side writes and reads each full-size map. Ours and the running maximum read logits and write
    labels; their intermediate values stay in a cache. Operations: 7 per bilinear pixel of a class, 1 per comparison.
    """
    (_, K, h, w), (H, W) = logits[0].shape, case.size
    one_step = case.middle == case.size
    maps = [H * W] if one_step else [case.middle[0] * case.middle[1], H * W]
    rows, columns = (cut_axis(*each, case.device) for each in zip((h, w), case.middle, case.size, strict=True))
    (T, P, _), (U, Q, _) = rows.weights.shape, columns.weights.shape
    windows = rows.windows * columns.windows
    found = [find_candidates(each[0], rows, columns) for each in logits]
    per_window = None
    work = {
        "plain": (4 * K * (h * w + 2 * sum(maps)) + 8 * H * W, K * (7 * sum(maps) + H * W)),
        "running": (4 * K * h * w + H * W, K * (7 * sum(maps) + H * W)),
    }
    if all(found):
        candidates = statistics.mean(len(pairs[1]) for pairs in found if pairs)
        per_window = candidates / windows
        search = K * h * w * (2 * (T + U - 2) + 2)
        # In a window with one candidate no pixel is interpolated.
        numbers = [pairs[0].bincount() for pairs in found if pairs]
        contested = statistics.mean(float(number[number > 1].sum()) for number in numbers)
        work["ours"] = (4 * K * h * w + H * W, round(search + contested * (2 * Q * T * U + 2 * P * Q * T + P * Q)))
    else:
        work["ours"] = work["running"]
    sides = {
        side: {
            "bytes": moved,
            "operations": done,
            "least_ms": 1e3 * max(moved / reached["bytes_per_s"], done / reached["operations_per_s"]),
        }
        for side, (moved, done) in work.items()
    }
    return {"candidates_per_window": per_window, "every_class_taken": per_window is None, "sides": sides}


# ---- measuring ---------------------------------------------------------------------------------------------------


def measure(logits: list[Tensor], case: Case) -> dict[str, Any]:
    """Runs all sides in turn: times of a label map, memory peaks, ratios, differences of labels, and least times."""
    torch.set_num_threads(case.threads)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(-1, case.rounds):  # the first warms up
        for side, function in SIDES.items():
            wait(logits[0])
            start = time.perf_counter()
            for each in logits:
                function(each, case.middle, case.size)
            wait(logits[0])
            if turn >= 0:
                times[side].append(1e3 * (time.perf_counter() - start) / len(logits))
    reached = speeds(case.device, case.threads)
    bound = roofline(logits, case, reached)
    medians = {side: statistics.median(spent) for side, spent in times.items()}
    return {
        "case": asdict(case) | {"images": len(logits), "shape": list(logits[0].shape)},
        "like": describe(logits[0].cpu()),
        "candidates_per_window": bound["candidates_per_window"],
        "every_class_taken": bound["every_class_taken"],
        "sides": {
            side: {
                "median_ms": medians[side],
                "all_ms": times[side],
                "peak_bytes": peak(side, logits[0], case),
                **bound["sides"][side],
                "times_the_least": medians[side] / bound["sides"][side]["least_ms"],
            }
            for side in SIDES
        },
        "plain_over": {side: medians["plain"] / medians[side] for side in ("running", "ours")},
        "against_plain": differences(logits, case),
        "reached": reached,
    }


def inputs(options: argparse.Namespace) -> list[tuple[str, list[Tensor], Size, Size]]:
    """Name, logits, size of the network's input, size of the image; each with one and with two steps."""
    classes, side = (19, 16) if options.smoke else (150, 64)
    made = [("trained-like", trained_like), ("white noise", white_noise)]
    found = [(name, [make(classes, side, 0)], (8 * side, 8 * side)) for name, make in made]
    if options.checkpoint:
        logits, size = model_logits(options.checkpoint, options.images, 2 if options.smoke else 6)
        found.append((options.checkpoint.name, logits, size))
    return [
        (name, logits, middle, size)
        for name, logits, middle in found
        for size in (middle, (round(middle[0] * 4 / 3), middle[1]))
    ]


def show(result: dict[str, Any]) -> None:
    case, share = result["case"], result["against_plain"]["ours"]
    steps = "one step" if case["middle"] == case["size"] else "two steps"
    found = result["candidates_per_window"]
    print(
        f"{case['device']} {case['logits']}, {steps}, {case['threads']} threads: "
        + ("too many candidates, all classes used" if found is None else f"{found:.2f} candidates a window")
        + f"; ours differs at {100 * share['share_of_pixels']:.4f} % of the pixels, by {share['logits_apart']:.1e}"
    )
    print("  logits: " + ", ".join(f"{key} {value:.2f}" for key, value in result["like"].items()))
    for side, of in result["sides"].items():
        ratio = result["plain_over"].get(side, 1.0)
        print(
            f"  {side:8}{of['median_ms']:8.2f} ms, plain/it {ratio:5.1f}; peak {of['peak_bytes'] / 1e6:7.1f} MB; "
            f"{of['bytes'] / 1e6:7.1f} MB, {of['operations'] / 1e6:7.1f} M operations: at least {of['least_ms']:.2f} ms"
        )


def main() -> int:
    """Measures, prints, writes; returns 1 if the sides disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small and quick; writes nothing")
    parser.add_argument("--checkpoint", type=Path, help="a model trained with ssaseg")
    parser.add_argument("--images", type=Path, help="folder of images of one size for --checkpoint")
    options = parser.parse_args()
    if (options.checkpoint is None) != (options.images is None):
        parser.error("give both --checkpoint and --images, or neither")
    command = "python benchmarks/labels.py"
    if options.checkpoint:
        command += f" --checkpoint {options.checkpoint.name} --images {options.images.name}"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    # On a machine without a GPU, the figures from a machine with a GPU are kept.
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    agree = True
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        measured = []
        for name, logits, middle, size in inputs(options):
            for threads in (1, 2) if device == "cpu" else (1,):
                case = Case(name, middle, size, threads, device, 2 if options.smoke else 11)
                with torch.inference_mode():
                    measured.append(measure([each.to(device) for each in logits], case))
                show(measured[-1])
                agree &= all(of["logits_apart"] < CLOSE for of in measured[-1]["against_plain"].values())
        results[device] = {
            "command": command,
            "versions": versions,
            "on": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
            "dtype": "float32",
            "cases": measured,
        }
    if not options.smoke:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print("the sides agree" if agree else f"the sides DISAGREE by more than {CLOSE} of the largest logit")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
