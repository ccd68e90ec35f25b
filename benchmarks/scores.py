"""What scoring costs, without the network: counting and boundary IoU per image, and the mIoU's interval at the end.

    OMP_NUM_THREADS=1 python benchmarks/scores.py    # writes benchmarks/results/scores.json
    python benchmarks/scores.py --smoke              # small and quick, writes nothing

150 classes. Counting: a label map and a prediction of 512×683. Boundary IoU: the same maps, against a plain side, which
is the authors' code for one mask: repeated erosion by 3×3 with OpenCV, for each class present. Interval: 1,000
resamples of 2,000 images, against a plain side that scores each resample from the counts of its images. Both sides run
in turn and must agree. One thread, as in an evaluation whose other cores decode images.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from ssaseg.cli.scoring.boundary import Boundaries, reach
from ssaseg.cli.scoring.metrics import Confusion, resampled_miou

RESULTS = Path(__file__).parent / "results" / "scores.json"


def scene(rng: np.random.Generator, size: tuple[int, int], present: np.ndarray) -> np.ndarray:
    """A label map uint8 (H,W): patches of about 50 pixels, and single pixels of other classes."""
    patches = rng.choice(present, (size[0] // 50 + 1, size[1] // 50 + 1)).astype(np.uint8)
    labels = cv2.resize(patches, size[::-1], interpolation=cv2.INTER_NEAREST)
    speckled = rng.random(size) < 0.01
    labels[speckled] = rng.choice(present, int(speckled.sum()))
    return labels


def plain_boundaries(label: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """Number of pixels in both bands, in the label's band, in the prediction's band: int (3,K)."""
    counts = np.zeros((3, classes), np.int64)
    d = reach(label.shape)
    for k in np.union1d(label, prediction):
        ours, theirs = (band((each == k).astype(np.uint8), d) for each in (label, prediction))
        counts[:, k] = (ours & theirs).sum(), ours.sum(), theirs.sum()
    return counts


def band(mask: np.ndarray, d: int) -> np.ndarray:
    around = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    return mask - cv2.erode(around, np.ones((3, 3), np.uint8), iterations=d)[1:-1, 1:-1]


def plain_interval(rows: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    scores = []
    for drawn in rng.integers(len(rows), size=(resamples, len(rows))):
        hits, union = rows[drawn].sum(axis=0)
        scores.append(100 * (hits[union > 0] / union[union > 0]).mean())
    return np.array(scores)


def in_turn(rounds: int, **sides: Callable[[], Any]) -> dict[str, dict[str, Any]]:
    """Median and all times of each side [ms]; the first round warms up."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(-1, rounds):
        for side, function in sides.items():
            started = time.perf_counter()
            function()
            if turn >= 0:
                times[side].append(1e3 * (time.perf_counter() - started))
    return {side: {"median_ms": statistics.median(spent), "all_ms": spent} for side, spent in times.items()}


def per_image(classes: int, size: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Counting and boundary IoU of one image."""
    rng = np.random.default_rng(0)
    present = rng.permutation(classes)[:20]
    label, prediction = (scene(rng, size, present) for _ in range(2))
    prediction = np.where(rng.random(size) < 0.8, label, prediction)
    maps = torch.from_numpy(prediction), torch.from_numpy(label)
    confusion, boundaries, once = Confusion(classes), Boundaries(classes), Boundaries(classes)
    once.update(*maps)
    agree = np.array_equal(once.counts[:, :classes].numpy(), plain_boundaries(label, prediction, classes))
    sides = in_turn(
        rounds,
        counting=lambda: confusion.update(*maps),
        boundary=lambda: boundaries.update(*maps),
        plain_boundary=lambda: plain_boundaries(label, prediction, classes),
    )
    ratio = sides["plain_boundary"]["median_ms"] / sides["boundary"]["median_ms"]
    return {"size": size, "classes": classes, "sides": sides, "plain_over_boundary": ratio, "agree": agree}


def interval(classes: int, images: int, resamples: int, rounds: int) -> dict[str, Any]:
    """The interval of a data set, given the counts of each image."""
    rng = np.random.default_rng(0)
    union = rng.integers(1, 40000, (images, classes)) * (rng.random((images, classes)) < 0.08)
    rows = np.stack([(union * rng.random(union.shape)).astype(np.int64), union], axis=1).astype(np.int32)
    ours, plain = (made(rows, resamples, np.random.default_rng(0)) for made in (resampled_miou, plain_interval))
    sides = in_turn(
        rounds,
        interval=lambda: resampled_miou(rows, resamples, np.random.default_rng(0)),
        plain_interval=lambda: plain_interval(rows, resamples, np.random.default_rng(0)),
    )
    ratio = sides["plain_interval"]["median_ms"] / sides["interval"]["median_ms"]
    return {
        "images": images,
        "classes": classes,
        "resamples": resamples,
        "bytes_kept_an_image": rows[0].nbytes,
        "sides": sides,
        "plain_over_interval": ratio,
        "agree": bool(np.allclose(ours, plain, rtol=0, atol=1e-9)),
    }


def main() -> int:
    """Measures, prints, writes; returns 1 if the sides disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small and quick; writes nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if options.smoke:
        results = [per_image(19, (64, 90), 2), interval(19, 30, 20, 2)]
    else:
        results = [per_image(150, (512, 683), 15), interval(150, 2000, 1000, 5)]
    for result in results:
        for side, spent in result["sides"].items():
            print(f"{side:16}{spent['median_ms']:10.2f} ms")
    agree = all(result["agree"] for result in results)
    if not agree:
        print("the sides disagree", file=sys.stderr)
    elif not options.smoke:
        report = {
            "command": "OMP_NUM_THREADS=1 python benchmarks/scores.py",
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "opencv": cv2.__version__},
            "on": platform.processor() or platform.machine(),
            "threads": 1,
            "dtype": "uint8 labels, int64 and float64 sums",
            "image": results[0],
            "set": results[1],
        }
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
