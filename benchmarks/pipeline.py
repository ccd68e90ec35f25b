"""Training pipeline: images per second and core, against mmsegmentation 1.2.2, in turn in one run on the same files.

    python benchmarks/pipeline.py --root data/camvid --mmseg-python PATH_TO_PYTHON
    python benchmarks/pipeline.py --smoke

Protocol: one thread, scale (2048, 512), ratio 0.5 to 2, crop 512, `images/train` and `annotations/train` below --root.
The interpreter given by --mmseg-python is that of the environment that tests/fixtures/make_mmseg_metrics.py describes;
without it that side is "not measured". Both sides read the same chunk of files in turn. The CPU time of the process is
measured, which other programs disturb little; the median over the rounds is reported. Our side is measured up to the
cropped uint8 batch, mmsegmentation's side up to colour distortion and packing; the work that we do on the device is
reported beside it.
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
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SCALE, RATIO, CROP = (2048, 512), (0.5, 2.0), (512, 512)
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
CLASSES = [str(i) for i in range(11)]
BATCH = 8
RESULT = Path(__file__).parent / "results" / "pipeline.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("data/camvid"))
    parser.add_argument("--mmseg-python", type=Path, help="interpreter that has mmsegmentation 1.2.2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--chunk", type=int, default=96, help="images per round and side")
    parser.add_argument("--smoke", action="store_true", help="a few tiny synthetic images; writes no result")
    parser.add_argument("--as-mmseg", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_mmseg:
        serve_mmseg(args.root)
    elif args.smoke:
        smoke()
    else:
        result = measure(args.root, args.mmseg_python, args.rounds, args.chunk)
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))


def smoke() -> None:
    """Everything except mmsegmentation, in a few seconds; checks that the figures are plausible."""
    import cv2
    import numpy as np

    rng = np.random.RandomState(0)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("images", "annotations"):
            Path(folder, name, "train").mkdir(parents=True)
        for i in range(6):
            label = cv2.resize(rng.randint(0, 11, (6, 8)).astype(np.uint8), (160, 120), interpolation=cv2.INTER_NEAREST)
            image = cv2.applyColorMap(label * 20, cv2.COLORMAP_JET)
            cv2.imwrite(str(Path(folder, "images/train", f"{i}.jpg")), image)
            cv2.imwrite(str(Path(folder, "annotations/train", f"{i}.png")), label)
        result = measure(Path(folder), None, rounds=1, chunk=BATCH)
    ours, moved = result["ours"], result["device part"]
    assert all(side["images/s and core"] > 0 for side in ours.values()), ours
    assert sum(result["stages [ms]"]["ours"].values()) > 0
    assert all(part["distort [ms]"] > 0 for part in moved.values()), moved
    assert all(speed > 0 for speed in result["end to end, 2 workers [images/s]"].values())
    assert result["mmsegmentation"] == "not measured"
    print(f"smoke: {json.dumps(ours)}")


def measure(root: Path, mmseg_python: Path | None, rounds: int, chunk: int) -> dict[str, Any]:
    import cv2
    import torch

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    works = {name: our_work(root, cache) for name, cache in (("files", False), ("cache", True))}
    count = len(works["files"].dataset)
    works["cache"].dataset.preload()
    other = MmsegProcess(mmseg_python, root) if mmseg_python else None
    seconds: dict[str, list[float]] = defaultdict(list)
    for turn in range(-1, rounds):  # turn -1 warms up: file cache, allocator, the check of each file's ids
        indices = [(turn * chunk + i) % count for i in range(chunk)] if turn >= 0 else list(range(count))
        for name, work in works.items():
            seconds[name].append(cpu_seconds(read(work, indices)) / chunk)
        if other:
            seconds["mmsegmentation"].append(other.ask("time", indices) / chunk)
    result: dict[str, Any] = {
        "command": f"python benchmarks/pipeline.py --root DIR --mmseg-python PATH --rounds {rounds} --chunk {chunk}",
        # If it is above the number of cores, other programs ran too, and all figures are worse than on an idle machine.
        "load average": os.getloadavg()[0],
        "versions": versions(),
        "processor": processor(),
        "threads": 1,
        "images": {"rounds": rounds, "chunk": chunk, "scale": SCALE, "ratio": RATIO, "crop": CROP},
        "ours": {name: rate(seconds[name][1:]) for name in works},
        "mmsegmentation": rate(seconds["mmsegmentation"][1:]) if other else "not measured",
        "stages [ms]": {"ours": our_stages(works["files"], chunk)},
    }
    if other:
        result["times mmsegmentation"] = {
            name: statistics.median(
                b / a for a, b in zip(seconds[name][1:], seconds["mmsegmentation"][1:], strict=True)
            )
            for name in works
        }
        result["stages [ms]"]["mmsegmentation"] = other.ask("stages", list(range(min(chunk, count))))
        result["versions"] |= other.ask("versions", [])
        other.close()
    result["device part"] = device_part(works["cache"], rounds)
    result["end to end, 2 workers [images/s]"] = {name: end_to_end(work, chunk * 2) for name, work in works.items()}
    return rounded(result)


def our_work(root: Path, cache: bool) -> Any:
    from ssaseg.datasets.loader import TrainWork
    from ssaseg.datasets.pairs import PairDataset
    from ssaseg.datasets.transforms import TrainTransform

    dataset = PairDataset(root / "images/train", root / "annotations/train", CLASSES, cache=cache)
    return TrainWork(dataset, TrainTransform(SCALE, RATIO, CROP), seed=0)


def read(work: Any, indices: list[int]) -> Iterator[Any]:
    """Batches of these images, made as in a worker."""
    for first in range(0, len(indices), BATCH):
        yield work[[(i, i) for i in indices[first : first + BATCH]]]


def our_stages(work: Any, chunk: int) -> dict[str, float]:
    """Milliseconds per image for each stage of a worker; the functions are replaced by timed ones."""
    import cv2

    from ssaseg.datasets import pairs

    times: dict[str, float] = defaultdict(float)
    transform = work.transform
    functions = [
        (pairs, "read_bands", "decode image"),
        (pairs, "read_mask", "decode mask"),
        (transform, "_choose_crop", "choose crop, resize label"),
        (cv2, "resize", "resize image"),
        (cv2, "flip", "flip"),
    ]
    originals = [getattr(owner, name) for owner, name, _ in functions]
    for (owner, name, stage), function in zip(functions, originals, strict=True):
        setattr(owner, name, timed(function, stage, times))
    try:
        total = cpu_seconds(read(work, [i % len(work.dataset) for i in range(chunk)]))
    finally:
        for (owner, name, _), function in zip(functions, originals, strict=True):
            setattr(owner, name, function)
    times["draws, copies, the rest"] = total - sum(times.values())
    return {stage: seconds / chunk * 1e3 for stage, seconds in times.items()}


def timed(function: Callable[..., Any], stage: str, times: dict[str, float]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        result = function(*args, **kwargs)
        times[stage] += time.process_time() - start
        return result

    return wrapped


def device_part(work: Any, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds per image of the work after the worker: distortion; conversion to float32, normalisation and
    padding.
    """
    import torch

    from ssaseg.datasets import colour

    batches = list(read(work, [i % len(work.dataset) for i in range(4 * BATCH)]))
    found: dict[str, dict[str, float]] = {}
    for device in [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available():
        wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        split: dict[str, list[float]] = defaultdict(list)
        for _ in range(max(rounds, 2)):
            for batch in batches:
                images = batch.images.to(device)
                wait()
                start = clock()
                planes = colour.to_planes(images)
                wait()
                middle = clock()
                colour.distort(planes, batch.draws)
                wait()
                distorted = clock()
                colour.normalize_planes(planes, MEAN, STD, batch.sizes)
                wait()
                split["distort [ms]"].append((distorted - middle) / BATCH * 1e3)
                split["convert and normalise [ms]"].append((middle - start + clock() - distorted) / BATCH * 1e3)
        # A mean, not a median: the distortion steps differ between batches. The first round warms up.
        found[device.type] = {name: statistics.mean(values[len(batches) :]) for name, values in split.items()}
    return found


def end_to_end(work: Any, images: int) -> float:
    """Images per second of wall time that two worker processes deliver to this one."""
    from ssaseg.datasets.loader import train_loader

    stream = train_loader(work.dataset, work.transform, 0, BATCH, workers=2)
    for _ in range(6):  # these batches are not counted: some of them are prepared ahead before the clock starts
        next(stream)
    start = time.perf_counter()
    for _ in range(images // BATCH):
        next(stream)
    speed = images / (time.perf_counter() - start)
    stream.close()
    return speed


class MmsegProcess:
    """This file, run by the other interpreter; it answers one question for each line."""

    def __init__(self, python: Path, root: Path) -> None:
        command = [str(python), __file__, "--as-mmseg", "--root", str(root)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, question: str, indices: list[int]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([question, indices]), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("answer "):  # mmengine prints too
                return json.loads(line.removeprefix("answer "))
        raise SystemExit(f"{self.process.args!r}: ended without an answer; is mmsegmentation installed in it?")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve_mmseg(root: Path) -> None:
    """mmsegmentation's side: its usual training pipeline on the same files."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fixtures"))
    from make_mmseg_stub import stub_mmcv_ops

    stub_mmcv_ops()
    import cv2
    import mmcv
    import mmseg
    import numpy as np
    import torch
    from mmseg.datasets import BaseSegDataset
    from mmseg.utils import register_all_modules

    register_all_modules()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    np.random.seed(0)
    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations"},
        {"type": "RandomResize", "scale": SCALE, "ratio_range": RATIO, "keep_ratio": True},
        {"type": "RandomCrop", "crop_size": CROP, "cat_max_ratio": 0.75},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "PhotoMetricDistortion"},
        {"type": "PackSegInputs"},
    ]
    dataset = BaseSegDataset(
        data_root=str(root),
        data_prefix={"img_path": "images/train", "seg_map_path": "annotations/train"},
        img_suffix=".jpg",
        seg_map_suffix=".png",
        metainfo={"classes": CLASSES},
        reduce_zero_label=False,
        pipeline=pipeline,
    )
    for line in sys.stdin:
        question, indices = json.loads(line)
        answer: Any
        if question == "time":
            answer = cpu_seconds(dataset[i] for i in indices)
        elif question == "stages":
            answer = mmseg_stages(dataset, indices)
        elif question == "deliver":
            answer = mmseg_delivered(dataset, *indices)
        else:
            answer = {"mmsegmentation": mmseg.__version__, "mmcv-lite": mmcv.__version__, "its opencv": cv2.__version__}
        print("answer " + json.dumps(answer), flush=True)


def mmseg_stages(dataset: Any, indices: list[int]) -> dict[str, float]:
    times: dict[str, float] = defaultdict(float)
    for index in indices:
        results = dataset.get_data_info(index)
        for transform in dataset.pipeline.transforms:
            start = time.process_time()
            results = transform(results)
            times[type(transform).__name__] += time.process_time() - start
    return {name: seconds / len(indices) * 1e3 for name, seconds in times.items()}


def mmseg_delivered(dataset: Any, workers: int, images: int) -> float:
    """Images that reach the main process per second of wall time, in batches as mmsegmentation's runner makes them."""
    import torch
    from mmengine.dataset import pseudo_collate

    ahead = {"prefetch_factor": 2, "persistent_workers": True} if workers else {}
    order = [i % len(dataset) for i in range(images + 6 * BATCH)]
    batches = iter(
        torch.utils.data.DataLoader(
            dataset, BATCH, sampler=order, num_workers=workers, collate_fn=pseudo_collate, **ahead
        )
    )
    for _ in range(6):
        next(batches)
    started = time.perf_counter()
    for _ in range(images // BATCH):
        next(batches)
    return images // BATCH * BATCH / (time.perf_counter() - started)


def cpu_seconds(results: Iterator[Any]) -> float:
    """CPU time of this process for computing all results; they are not kept."""
    start = time.process_time()
    for _ in results:
        pass
    return time.process_time() - start


def rate(seconds: list[float]) -> dict[str, float]:
    middle = statistics.median(seconds)
    return {"ms/image": middle * 1e3, "images/s and core": 1 / middle}


def versions() -> dict[str, str]:
    import cv2
    import numpy as np
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }


def processor() -> str:
    names = (
        [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else [platform.processor()]
    )
    return f"{names[0]}, {os.cpu_count()} cores"


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
