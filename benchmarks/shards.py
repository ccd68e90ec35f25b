"""`ssaseg predict --shard`: images a second of 1, 2 and 4 shards against the plain command, and resident memory.

    python benchmarks/shards.py [--images 400]            # writes benchmarks/results/shards.json
    python benchmarks/shards.py --memory [--count 20000]  # writes results/shards_memory.json
    python benchmarks/shards.py --smoke                   # small and quick, writes nothing

Speed: built-in scenes of 480×360, SeaFormer-S with SSA with the weights of benchmarks/weights, `--save index`. The
sides run in turn, each in a new folder: the plain command, and N commands with `--shard i/N` that start together, each
with its share of the cores, followed by `ssaseg merge`; `--shard 0/1` is the plain command. `whole`: from the start of
the commands to the end of the last one, with the start of Python and the reading of weights; `labelling`: the slowest
command's own figure of labelling alone.

Memory: hard links to one image of 32×32, SeaFormer-T with random weights; the resident set is read before each image.
`slope`: KiB per 1,000 images by least squares over the last half, of the plain command and of two shards of the same
images. `merge`: the largest resident set of `ssaseg merge` of the two shards.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loader_memory import slope
from networks import processor, rounded

RESULTS = Path(__file__).parent / "results"
SHIPPED = Path(__file__).parent / "weights" / "camvid-seaformer_s-ssa.safetensors"
COMMAND = "from ssaseg.cli.main import cli; cli()"
# The same, which also prints the resident set [KiB] before each image, or at last the largest.
MEASURED = """
import sys, psutil
if sys.argv[1] == "predict":
    from ssaseg.cli.prediction import predict
    process, real, seen = psutil.Process(), predict.Inference.predict_batch, []
    def measured(*given):
        seen.append(process.memory_info().rss // 1024)
        return real(*given)
    predict.Inference.predict_batch = measured
from ssaseg.cli.main import cli
try:
    cli()
finally:
    if sys.argv[1] != "predict":  # ru_maxrss would be that of the process that has started this one
        seen = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:")]
    print("KIB", *seen)
"""
DONE = re.compile(r"labelled (\d+) of \d+ images in ([\d.]+) s")
SHARDS = (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=400, help="images to label for the speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="memory in place of speed")
    parser.add_argument("--count", type=int, default=20_000, help="images to label for the memory")
    parser.add_argument("--smoke", action="store_true", help="a few small images; writes no result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            found = speed(Path(folder), 6, (64, 96), 1, shards=(1,))
            assert all(side["whole [images/s]"] > 0 for side in found["sides"].values()), found
            print(f"smoke: {json.dumps(rounded(found['sides']))}")
            return
        found, name = (
            (memory(Path(folder), options.count), "shards_memory")
            if options.memory
            else (speed(Path(folder), options.images, (360, 480), options.rounds), "shards")
        )
    text = json.dumps(rounded({**found, **conditions()}), indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)


def conditions() -> dict[str, Any]:
    import torch

    return {
        "command": " ".join(["python", "benchmarks/shards.py", *sys.argv[1:]]),
        "device": f"{processor('cpu')}, {os.cpu_count()} cores",
        "dtype": "float32",
        "load average at the end": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


# ---- speed -------------------------------------------------------------------------------------------------------
def speed(
    folder: Path, images: int, size: tuple[int, int], rounds: int, shards: Sequence[int] = SHARDS
) -> dict[str, Any]:
    """Images a second of each side; size: (height, width) [pixels]."""
    from ssaseg.datasets.exporting import export_scenes

    scenes = folder / "scenes"
    export_scenes(scenes, images, height=size[0], width=size[1])
    words = ["predict", str(SHIPPED), str(scenes / "images"), "--device", "cpu", "--backend", "torch", "--precision"]
    words += ["float32", "--out"]
    sides: dict[str, list[tuple[float, float]]] = {}
    for number in range(rounds):
        for count in (0, *shards):
            name = f"{count} shards" if count else "plain"
            out = folder / f"{number}-{count}"
            sides.setdefault(name, []).append(timed([*words, str(out)], out, count, images))
    return {
        "images": images,
        "size": f"{size[1]}x{size[0]}",
        "rounds": rounds,
        "sides": {
            name: {
                "whole [images/s]": statistics.median(images / each[0] for each in found),
                "labelling [images/s]": statistics.median(images / each[1] for each in found),
                "whole, to plain": statistics.median(
                    plain[0] / each[0] for each, plain in zip(found, sides["plain"], strict=True)
                ),
            }
            for name, found in sides.items()
        },
    }


def timed(words: list[str], out: Path, shards: int, images: int) -> tuple[float, float]:
    """Seconds from the first start to the last end, and of the labelling in the slowest command."""
    threads = max((os.cpu_count() or 1) // max(shards, 1), 1)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    commands = [[*words, "--shard", f"{number}/{shards}"] for number in range(shards)] or [[*words, "--shard", "none"]]
    running = [run(each, env) for each in commands]
    told = [process.communicate()[0] for process in running]
    if shards:
        run(["merge", str(out)], env).communicate()
    seconds = time.perf_counter() - start
    found = [match for each in told if (match := DONE.search(each))]
    assert sum(int(match[1]) for match in found) == images, told
    assert len((out / "manifest.jsonl").read_text().splitlines()) == images
    return seconds, max(float(match[2]) for match in found)


def run(words: Sequence[str], env: dict[str, str], code: str = COMMAND) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


# ---- memory ------------------------------------------------------------------------------------------------------
def memory(folder: Path, count: int) -> dict[str, Any]:
    """Resident sets of the plain command with `count` images, of two shards of them, and of merge [KiB]."""
    import cv2
    import numpy as np
    import torch

    from ssaseg.models import build_model, save_model

    torch.manual_seed(0)
    weights = folder / "seaformer_t.safetensors"
    header = {"classes": list("abcd"), "protocol": {"scale": None, "multiple": None}}
    save_model(weights, build_model("seaformer_t", 4), header)
    (folder / "in").mkdir()
    first = folder / "in/000000.png"
    cv2.imwrite(str(first), np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for number in range(1, count):
        os.link(first, folder / f"in/{number:06}.png")
    words = ["predict", str(weights), str(folder / "in"), "--device", "cpu", "--save", "index,rle", "--out"]
    sides = {"plain": resident([*words, str(folder / "plain"), "--shard", "none"])}
    for shard in ("0/2", "1/2"):
        sides[f"shard {shard}"] = resident([*words, str(folder / "out"), "--shard", shard])
    merged = resident(["merge", str(folder / "out")])
    return {
        "sides": {
            name: {
                "images": len(kib),
                "slope [KiB per 1,000 images]": 1000 * slope(list(range(len(kib))), [float(each) for each in kib]),
                "resident before the first image [MiB]": kib[0] / 1024,
                "in the middle [MiB]": kib[len(kib) // 2] / 1024,
                "before the last [MiB]": kib[-1] / 1024,
            }
            for name, kib in sides.items()
        },
        "merge, largest [MiB]": merged[0] / 1024,
    }


def resident(words: list[str]) -> list[int]:
    """What a command measured of itself [KiB]."""
    told, _ = run(words, {**os.environ, "OMP_NUM_THREADS": "1", "SSASEG_ALLOCATOR": "system"}, MEASURED).communicate()
    (line,) = (line for line in told.splitlines() if line.startswith("KIB "))
    return [int(value) for value in line.split()[1:]]


if __name__ == "__main__":
    main()
