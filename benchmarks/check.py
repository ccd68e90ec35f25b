"""`ssaseg data check` on files of ADE20K's size: seconds for 2,000 pairs.

    python benchmarks/check.py
    python benchmarks/check.py --smoke

Protocol: pairs of 683x512 pixels, JPEG (quality 90) and PNG (one byte a pixel), are written into a temporary folder: a
few built-in scenes, each many times. The files are read from the page cache. Two times are measured: the wall time of
the whole command, with imports and table, as a user waits for it; and that of reading the pairs alone, with one process
and with one process per core in turn.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "check.json"
RECIPE = """
model: {{name: seaformer_t}}
data:
  root: {root}
  train: {{images: images, masks: masks}}
  val: {{images: images, masks: masks}}
  classes: {classes}
augment: {{scale: [2048, 512], crop: [512, 512]}}
optim: {{lr: 1.0e-3}}
train: {{steps: 1}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a few small pairs; writes no result")
    args = parser.parse_args()
    if args.smoke:
        result = measure(pairs=6, scenes=2, size=(96, 128), rounds=1)
        assert result["command [s]"] > 0, result
        assert result["read alone, 1 process [s]"] > 0, result
        print(f"smoke: {json.dumps(result)}")
        return
    result = measure(args.pairs, 40, (512, 683), args.rounds)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def measure(pairs: int, scenes: int, size: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Median seconds of `rounds`; size: (height, width) [pixels]."""
    import cv2
    import numpy as np

    from ssaseg.cli.device import count_cores
    from ssaseg.datasets.check import look_through
    from ssaseg.datasets.pairs import PairDataset
    from ssaseg.datasets.synthetic import CLASSES

    cores = count_cores()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_pairs(root, pairs, scenes, size)
        recipe = root / "recipe.yaml"
        recipe.write_text(RECIPE.format(root=root, classes=list(CLASSES)))
        dataset = PairDataset(root / "images", root / "masks", CLASSES)
        command, alone, together = [], [], []
        for _ in range(rounds):
            command.append(seconds_of_command(recipe))
            for workers, times in ((1, alone), (cores, together)):
                start = time.perf_counter()
                findings = look_through(dataset, workers=workers)
                times.append(time.perf_counter() - start)
                assert findings.read == pairs
                assert not findings.problems, findings.problems[:3]
        bytes_of = {kind: sum(file.stat().st_size for file in (root / kind).iterdir()) for kind in ("images", "masks")}
    return {
        "command": " ".join(["python", "benchmarks/check.py", *sys.argv[1:]]),
        "pairs": pairs,
        "size": f"{size[1]}x{size[0]}, {len(CLASSES)} classes",
        "KiB a file": {kind: round(count / pairs / 1024, 1) for kind, count in bytes_of.items()},
        "processes": cores,
        "threads in each": 1,
        "rounds": rounds,
        "command [s]": round(statistics.median(command), 2),
        "read alone, 1 process [s]": round(statistics.median(alone), 2),
        f"read alone, {cores} processes [s]": round(statistics.median(together), 2),
        "ratio": round(statistics.median(alone) / statistics.median(together), 2),
        "dtype": "uint8",
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load average before the end": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "opencv": cv2.__version__},
    }


def write_pairs(root: Path, pairs: int, scenes: int, size: tuple[int, int]) -> None:
    import cv2

    from ssaseg.datasets.synthetic import SyntheticScenes

    for kind in ("images", "masks"):
        (root / kind).mkdir()
    drawn = SyntheticScenes(scenes, *size, 0, "train")
    for index in range(pairs):
        image, mask = root / f"images/{index:05d}.jpg", root / f"masks/{index:05d}.png"
        if index < scenes:
            picture, label = drawn.load(index)
            cv2.imwrite(str(image), picture, [cv2.IMWRITE_JPEG_QUALITY, 90])
            cv2.imwrite(str(mask), label)
        else:
            shutil.copyfile(root / f"images/{index % scenes:05d}.jpg", image)
            shutil.copyfile(root / f"masks/{index % scenes:05d}.png", mask)


def seconds_of_command(recipe: Path) -> float:
    """Wall time of the command on one split."""
    call = "import sys; from ssaseg.cli.main import cli; sys.exit(cli())"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", call, "data", "check", str(recipe), "--split", "train"], capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stdout + done.stderr
    return seconds


if __name__ == "__main__":
    main()
