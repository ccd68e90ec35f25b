"""`ssaseg predict --engine ray --actors 2` against two plain shards, `--shard 0/2` and `--shard 1/2`, on two cores.

    python benchmarks/ray_overhead.py --images ../shared/data/camvid/images/val   # writes results/ray_overhead.json
    python benchmarks/ray_overhead.py --smoke                                      # small and quick, writes nothing

Protocol: JPEG frames of 480×360, repeated where there are fewer, without --images built-in scenes; SeaFormer-S with SSA
of benchmarks/weights, PyTorch, float32, PNG of class numbers. Each shard has a core of its own and one thread, as each
actor has. Times are of whole commands, from the start of the first process to the end of the last one. Each side labels
two numbers of images, in turn: the difference between the two times is that of the images alone, the rest is the start.
The results of both sides must be the same files. Without the extra `ray` nothing is measured.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from networks import processor, rounded
from predict import COMMAND, SHIPPED, SMALL, make_frames

RESULTS = Path(__file__).parent / "results" / "ray_overhead.json"
SIDES = ("shards", "ray")
ACTORS = 2
FIXED = ("--device", "cpu", "--backend", "torch", "--precision", "float32")


def label(side: str, frames: Path, out: Path) -> float:
    """Seconds that a side takes for all frames of a folder, with its start."""
    words = [sys.executable, "-c", COMMAND, "predict", str(SHIPPED), str(frames), "--out", str(out), *FIXED]
    more = [["--engine", "ray", "--actors", str(ACTORS)]]
    if side == "shards":
        more = [["--shard", f"{index}/{ACTORS}"] for index in range(ACTORS)]
    cores = sorted(os.sched_getaffinity(0))
    started = time.perf_counter()
    processes = []
    for index, options in enumerate(more):
        own = {cores[index]} if side == "shards" else set(cores)
        processes.append(
            subprocess.Popen(
                [*words, *options],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                preexec_fn=lambda own=own: os.sched_setaffinity(0, own),
            )
        )
    for process in processes:
        _, printed = process.communicate()
        if process.returncode:
            raise SystemExit(f"{side} failed:\n{printed[-1000:]}")
    return time.perf_counter() - started


def contents(out: Path) -> dict[str, bytes]:
    """All label files of a folder."""
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted((out / "index").rglob("*.png"))}


def measure(counts: tuple[int, int], rounds: int, images: Path | None, folder: Path) -> dict[str, Any]:
    """Seconds of both sides for both numbers of images, and what follows from them."""
    frames = {count: make_frames(images, folder / str(count) / "frames", count, SMALL) for count in counts}
    seconds: dict[str, dict[int, list[float]]] = {side: {count: [] for count in counts} for side in SIDES}
    for turn in range(rounds):
        for count in counts:
            for side in SIDES:
                out = folder / f"{turn}-{side}-{count}"
                seconds[side][count].append(label(side, frames[count], out))
                print(f"{side} {count} images: {seconds[side][count][-1]:.1f} s", file=sys.stderr, flush=True)
            made = [contents(folder / f"{turn}-{side}-{count}") for side in SIDES]
            if len(made[0]) != count or made[0] != made[1]:
                raise SystemExit(f"the results of both sides DIFFER for {count} images")
    few, many = counts
    medians = {
        side: {count: statistics.median(found) for count, found in each.items()} for side, each in seconds.items()
    }
    per_image = {side: (found[many] - found[few]) / (many - few) for side, found in medians.items()}
    return {
        "seconds": {
            side: {f"{count} images": found for count, found in each.items()} for side, each in seconds.items()
        },
        "images/s without the start": {side: 1 / max(spent, 1e-9) for side, spent in per_image.items()},
        "start [s]": {side: found[few] - few * per_image[side] for side, found in medians.items()},
        "seconds an image, ray/shards": per_image["ray"] / per_image["shards"],
        f"seconds of {many} images, ray/shards": medians["ray"][many] / medians["shards"][many],
    }


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of frames of 480×360; default: built-in scenes")
    parser.add_argument("--smoke", action="store_true", help="small and quick; writes nothing")
    options = parser.parse_args()
    if find_spec("ray") is None:
        print("not measured: the extra `ray` is not installed")
        return 0
    cores = sorted(os.sched_getaffinity(0))[:ACTORS]
    if len(cores) < ACTORS:
        print(f"not measured: needs {ACTORS} cores")
        return 0
    os.sched_setaffinity(0, cores)
    counts, rounds = ((4, 8), 1) if options.smoke else ((120, 960), 3)
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(counts, rounds, options.images, Path(temporary))
    print(json.dumps(rounded(found), indent=1))
    if not options.smoke:
        results = {
            "command": "python benchmarks/ray_overhead.py"
            + " --images CAMVID/images/val" * (options.images is not None),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "ray")}},
            "on": processor("cpu"),
            "cores": len(cores),
            "load average": os.getloadavg()[0],
            "equal label files": True,
            **rounded(found),
        }
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
