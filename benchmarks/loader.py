"""The loader: time per image by stage, images per second by number of workers, against mmsegmentation; and memory.

    python benchmarks/loader.py --mmseg-python PATH_TO_PYTHON      # on generated pairs of ADE20K's size
    python benchmarks/loader.py --root data/ade/ADEChallengeData2016
    python benchmarks/loader.py --memory                           # resident memory over 10,000 samples
    python benchmarks/loader.py --smoke

Protocol: ADE20K's training pipeline (scale (2048, 512), ratio 0.5 to 2, crop 512, distortion) in batches of 8, each
process with one thread. --root holds images/ and annotations/, and in each of them training/ or train/. Without --root,
64 scenes of 683x512 pixels are drawn, as JPEG files of about 40 KB, the average of ADE20K's training images. Times of
stages are CPU times, each without the stages inside it, in one worker, and in two workers at the same time. Images per
second are those that reach the main process, by wall time, for our loader and mmsegmentation's in turn, medians over
the rounds. mmsegmentation's side includes the colour distortion, which we do on the device: that time is reported
beside the stages.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from loader_memory import evaluation_slope, loader_slopes
from pipeline import BATCH, CROP, RATIO, SCALE, MmsegProcess, device_part, processor, read, rounded, versions

RESULTS = Path(__file__).parent / "results"
WARM = 6  # first batches, which are not counted: they are prepared ahead, or read while a worker starts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, help="folder with images/ and annotations/; default: generated pairs")
    parser.add_argument("--mmseg-python", type=Path, help="interpreter that has mmsegmentation 1.2.2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=192, help="images per round, side and number of workers")
    parser.add_argument("--memory", action="store_true", help="resident memory instead of time")
    parser.add_argument("--samples", type=int, default=10_000, help="samples read for --memory")
    parser.add_argument("--smoke", action="store_true", help="a few tiny images; writes no result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.smoke:
            smoke(Path(scratch))
            return
        root = linked(args.root, Path(scratch)) if args.root else generated(Path(scratch), 64, 512, 683)
        if args.memory:
            result, name = memory(root, args.samples), "loader_memory"
        else:
            result, name = speed(root, args.mmseg_python, args.rounds, args.images), "loader"
    result["data"] = "--root DIR" if args.root else "64 generated pairs of 683x512 pixels"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(rounded(result), indent=1) + "\n")
    print(json.dumps(rounded(result), indent=1))


def smoke(scratch: Path) -> None:
    """Everything except mmsegmentation, in a few seconds; checks that the figures are plausible."""
    root = generated(scratch, 8, 96, 128)
    result = speed(root, None, rounds=1, images=2 * BATCH)
    for workers in ("1 worker", "2 workers"):
        assert set(result["stages [ms]"][workers]) >= {"decode image", "resize image", "flip, crop, pad"}, result
        assert all(value >= 0 for value in result["stages [ms]"][workers].values()), result
    assert all(side["ours"] > 0 for side in result["images/s"].values()), result
    memory_result = memory(root, 40 * BATCH, images=20)
    assert len(memory_result["slope [KiB a sample]"]) == 3, memory_result
    print(f"smoke: {json.dumps(rounded(result['images/s']))}")


# ---- data --------------------------------------------------------------------------------------------------------


def generated(folder: Path, count: int, height: int, width: int) -> Path:
    """`count` scenes as files below `folder`, in the layout of `linked`."""
    import cv2

    from ssaseg.datasets.synthetic import SyntheticScenes

    scenes = SyntheticScenes(count, height, width)
    for kind in ("images", "annotations"):
        (folder / kind / "train").mkdir(parents=True)
    for i in range(count):
        image, label = scenes.load(i)
        cv2.imwrite(str(folder / "images/train" / f"{i}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 72])
        cv2.imwrite(str(folder / "annotations/train" / f"{i}.png"), label)
    return folder


def linked(root: Path, scratch: Path) -> Path:
    """A folder with images/train and annotations/train, as links to the folders of `root`."""
    for kind in ("images", "annotations"):
        source = next((root / kind / name for name in ("training", "train") if (root / kind / name).is_dir()), None)
        if source is None:
            raise SystemExit(f"{root / kind}: has neither a folder training nor a folder train")
        (scratch / kind).mkdir()
        (scratch / kind / "train").symlink_to(source.resolve())
    return scratch


def our_work(root: Path) -> Any:
    """The work of a worker. The meaning of the ids does not matter here: every id below 255 is a class."""
    from ssaseg.datasets.loader import TrainWork
    from ssaseg.datasets.pairs import PairDataset
    from ssaseg.datasets.transforms import TrainTransform

    dataset = PairDataset(root / "images/train", root / "annotations/train", [str(i) for i in range(255)])
    return TrainWork(dataset, TrainTransform(SCALE, RATIO, CROP), seed=0)


# ---- time --------------------------------------------------------------------------------------------------------


def speed(root: Path, mmseg_python: Path | None, rounds: int, images: int) -> dict[str, Any]:
    import cv2
    import torch

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    work = our_work(root)
    indices = [i % len(work.dataset) for i in range(images)]
    other = MmsegProcess(mmseg_python, root) if mmseg_python else None
    stages = {name: stages_in_workers(work, indices, workers) for name, workers in (("1 worker", 1), ("2 workers", 2))}
    rates: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(rounds):
        for workers in (0, 1, 2):
            rates[f"{workers} workers"]["ours"].append(delivered(work, workers, images))
            if other:
                rates[f"{workers} workers"]["mmsegmentation"].append(other.ask("deliver", [workers, images]))
    result: dict[str, Any] = {
        "command": f"python benchmarks/loader.py --rounds {rounds} --images {images}"
        + (" --mmseg-python PATH" if other else ""),
        "load average": os.getloadavg()[0],
        "versions": versions(),
        "processor": processor(),
        "threads": 1,
        "batch": BATCH,
        "stages [ms]": stages
        | {
            "hand over": hand_over(work, images),
            "device part": device_part(work, 2),
        },
        "images/s": {
            name: {side: statistics.median(values) for side, values in sides.items()} for name, sides in rates.items()
        },
    }
    if other:
        for name, sides in rates.items():
            pairs = zip(sides["ours"], sides["mmsegmentation"], strict=True)
            result["images/s"][name]["ratio"] = statistics.median(ours / theirs for ours, theirs in pairs)
        result["stages [ms]"]["mmsegmentation"] = other.ask("stages", indices)
        result["versions"] |= other.ask("versions", [])
        other.close()
    result["limit"] = limit(result)
    return result


class Stages:
    """CPU time of wrapped functions, each without the wrapped functions that it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.open = ["draws, checks, the rest"]
        self.mark = time.process_time()

    def switch(self) -> None:
        """Adds the time since the last switch to the innermost open stage."""
        now = time.process_time()
        self.seconds[self.open[-1]] += now - self.mark
        self.mark = now

    def timed(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self.open.append(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self.open.pop()

        return wrapped


def stage_times(work: Any, indices: list[int]) -> dict[str, float]:
    """Milliseconds per image of each stage; the functions are replaced by timed ones."""
    import cv2
    import numpy as np

    from ssaseg.datasets import pairs, transforms

    functions = [
        (pairs.Path, "read_bytes", "read file"),
        (pairs, "read_bands", "decode image"),
        (pairs, "read_mask", "decode mask"),
        (work.transform, "_choose_crop", "choose crop"),
        (transforms, "resize_label_window", "resize and crop label"),
        (cv2, "resize", "resize image"),
        (cv2, "flip", "flip, crop, pad"),
        (np, "copyto", "flip, crop, pad"),
    ]
    for _ in read(work, indices[:BATCH]):
        pass
    stages = Stages()
    with contextlib.ExitStack() as stack:
        for owner, name, stage in functions:
            stack.enter_context(mock.patch.object(owner, name, stages.timed(getattr(owner, name), stage)))
        stages.mark = time.process_time()
        for _ in read(work, indices):
            pass
        stages.switch()
    return {stage: seconds / len(indices) * 1e3 for stage, seconds in stages.seconds.items()}


def stages_in_workers(work: Any, indices: list[int], workers: int) -> dict[str, float]:
    """Means over `workers` processes that work at the same time, on the same files in a different order."""
    starts = [worker * len(indices) // workers for worker in range(workers)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        found = pool.starmap(stage_times, [(work, indices[start:] + indices[:start]) for start in starts], chunksize=1)
    means = {stage: statistics.mean(times[stage] for times in found) for stage in found[0]}
    return means | {"all": sum(means.values())}


def hand_over(work: Any, images: int) -> dict[str, float]:
    """CPU milliseconds per image in a worker and in the main process, while the worker sends its batches."""
    import psutil

    from ssaseg.datasets.loader import train_loader

    before = set(psutil.Process().children())
    stream = train_loader(work.dataset, work.transform, 0, BATCH, workers=1)
    with contextlib.closing(stream):  # type: ignore[type-var]
        for _ in range(WARM):
            next(stream)
        (worker,) = set(psutil.Process().children()) - before
        taken, made = time.process_time(), sum(worker.cpu_times()[:2])
        for _ in range(images // BATCH):
            next(stream)
        taken, made = time.process_time() - taken, sum(worker.cpu_times()[:2]) - made
    count = images // BATCH * BATCH
    return {
        "worker: stages and sending": made / count * 1e3,
        "main process: taking over": taken / count * 1e3,
    }


def delivered(work: Any, workers: int, images: int) -> float:
    """Images that reach this process per second of wall time."""
    from ssaseg.datasets.loader import train_loader

    stream = train_loader(work.dataset, work.transform, 0, BATCH, workers)
    with contextlib.closing(stream):  # type: ignore[type-var]
        return drained(stream, images)


def drained(stream: Iterator[Any], images: int) -> float:
    for _ in range(WARM):
        next(stream)
    started = time.perf_counter()
    for _ in range(images // BATCH):
        next(stream)
    return images // BATCH * BATCH / (time.perf_counter() - started)


def limit(result: dict[str, Any]) -> str:
    """What limits the loader: what to add or to improve where the device waits for data."""
    stages = dict(result["stages [ms]"]["1 worker"])
    total = stages.pop("all")
    first, second = sorted(stages, key=lambda name: -stages[name])[:2]
    working, taking = result["stages [ms]"]["hand over"].values()
    return (
        f"the CPU of the workers: {working:.1f} ms per image, most in {first} {stages[first] / total:.0%}, {second} "
        f"{stages[second] / total:.0%}; so about {1e3 / working:.0f} images/s per core, up to {1e3 / taking:.0f} "
        "images/s, where receiving in the main process becomes the limit"
    )


# ---- memory ------------------------------------------------------------------------------------------------------


def memory(root: Path, samples: int, images: int = 600) -> dict[str, Any]:
    """Slopes of resident memory, by least squares: over the last half of `samples`, and over evaluated images."""
    slopes, sizes = loader_slopes(our_work(root), samples)
    return {
        "command": f"python benchmarks/loader.py --memory --samples {samples}",
        "versions": versions(),
        "processor": processor(),
        "samples": samples,
        "slope [KiB a sample]": slopes,
        "resident [MiB] at a tenth, half, end": sizes,
        "evaluation: slope [KiB an image]": evaluation_slope(images),
        "evaluated images": images,
    }


if __name__ == "__main__":
    main()
