"""Fails unless the demo has learnt something: `python benchmarks/check_demo.py RUN`, the last step of `make demo`.

Two conditions: the mIoU is at least three times the mIoU of predicting the commonest class everywhere; and every pair
of look-alike classes, which are drawn by the same function and differ only in their surroundings, is distinguished
clearly better than by chance (balanced accuracy over the pixels of the pair; chance is 50 %).
"""

import json
import sys
from pathlib import Path

import numpy as np

from ssaseg.datasets.synthetic import LOOK_ALIKES

CLEARLY_BETTER_THAN_CHANCE = 60.0  # [%]


def main(run: Path) -> int:
    """Prints the result of the demo. Returns 0 where both conditions hold, 1 otherwise."""
    result = json.loads((run / "eval.json").read_text())
    names = [row["name"] for row in result["classes"]]
    confusion = np.asarray(result["confusion"])  # rows: labels, columns: predictions
    miou, majority = result["mIoU"], result["majority_miou"]
    good = miou >= 3 * majority
    print(f"mIoU {miou:.2f} %, {miou / majority:.1f} times that of the commonest class everywhere ({majority:.2f} %)")
    for pair in LOOK_ALIKES:
        indices = [names.index(name) for name in pair]
        counts = confusion[np.ix_(indices, indices)]
        accuracy = float((counts.diagonal() / counts.sum(axis=1)).mean() * 100)
        print(f"{pair[0]} and {pair[1]}, which look alike: {accuracy:.1f} % distinguished (chance: 50 %)")
        good &= accuracy >= CLEARLY_BETTER_THAN_CHANCE
    print(f"overlays: {run / 'labels/overlay'}\ncurves:   {run / 'curves.png'}\nbatch:    {run / 'batch.png'}")
    print("demo: passed" if good else "demo: FAILED, the network did not learn enough")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
