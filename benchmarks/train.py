"""Training end to end: images per second of `ssaseg train`, against mmsegmentation 1.2.2's runner, in turn in one run.

    python benchmarks/train.py --root data/camvid --mmseg-python PATH_TO_PYTHON   # writes benchmarks/results/train.json
    python benchmarks/train.py --smoke                                            # small and quick, writes nothing

Protocol: SegNeXt-T with the plain classifier, 11 classes, batch 8, crop 256×256, float32, AdamW, the augmentation of
the official configuration with scale (480, 360), on a CPU with all its cores and two workers. Both sides are whole
programs from new weights: files are read, decoded, augmented; forward, backward, update, log. The time is that from
the end of step `WARM` to the end of the last step; start, evaluation and saving are not in it. `system` is ours with
the memory allocator of the system (SSASEG_ALLOCATOR=system). The interpreter given by --mmseg-python is that of the
environment that tests/fixtures/make_mmseg_metrics.py describes; without it that side is "not measured".

"processor" is the working time of all processes of a side, in milliseconds for an image; it depends less on what else
runs. "input" is what a worker of ours needs for an image, with and without the distortion of colours.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

SCALE, RATIO, CROP, BATCH, WORKERS, CLASSES = (480, 360), (0.5, 2.0), (256, 256), 8, 2, 11
WARM = 10  # steps before the clock starts
GOALS = {"ours/mmsegmentation": "at least 2"}
RESULTS = Path(__file__).parent / "results" / "train.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("data/camvid"))
    parser.add_argument("--mmseg-python", type=Path, help="interpreter that has mmsegmentation 1.2.2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="of each round and side")
    parser.add_argument("--warm", type=int, default=WARM, help="steps of these before the clock starts")
    parser.add_argument("--smoke", action="store_true", help="a few steps on tiny scenes; writes no result")
    parser.add_argument("--as-mmseg", type=int, metavar="STEPS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_mmseg:
        print(json.dumps(train_mmseg(args.root, args.as_mmseg, args.warm)))
    elif args.smoke:
        smoke()
    else:
        result = measure(args.root.resolve(), args.mmseg_python, args.rounds, args.steps, args.warm)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))


def smoke() -> None:
    """Our side on scenes that are written as files."""
    from networks import rounded

    from ssaseg.datasets.exporting import export_scenes

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for split in ("train", "val"):
            export_scenes(root, 8, split=split, height=96, width=96)
        small = ["model.name=seaformer_t", "augment.scale=[96,96]", "augment.crop=[64,64]", "train.batch=2"]
        found = ours(root, 4, 2, "calm", small)
        assert found["images/s"] > 0, found
        assert found["processor [ms]"] > 0, found
        assert input_path(root, 8)["distortion [ms]"] > 0
    print(f"smoke: {json.dumps(rounded(found))}")


def measure(root: Path, mmseg_python: Path | None, rounds: int, steps: int, warm: int) -> dict[str, Any]:
    from networks import processor, rounded

    sides = {"ours": lambda: ours(root, steps, warm), "system": lambda: ours(root, steps, warm, "system")}
    if mmseg_python:
        sides["mmsegmentation"] = lambda: mmseg(mmseg_python, root, steps, warm)
    rates: dict[str, list[float]] = defaultdict(list)
    work: dict[str, list[float]] = defaultdict(list)
    versions: dict[str, str] = {}
    for _ in range(rounds):
        for name, run in sides.items():
            found = run()
            rates[name].append(found["images/s"])
            work[name].append(found["processor [ms]"])
            versions |= found["versions"]
            print(name, rounded(found["images/s"]), "images/s", flush=True)
    result: dict[str, Any] = {
        "command": "python benchmarks/train.py --root DIR --mmseg-python PATH "
        f"--rounds {rounds} --steps {steps} --warm {warm}",
        "load average": os.getloadavg()[0],
        "versions": versions,
        "processor": processor("cpu"),
        "settings": {"scale": SCALE, "ratio": RATIO, "crop": CROP, "batch": BATCH, "workers": WORKERS},
        "images/s": {name: {"median": statistics.median(values), "all": values} for name, values in rates.items()},
        "processor [ms an image]": {name: statistics.median(values) for name, values in work.items()},
        "input": input_path(root, 96),
        "mmsegmentation": "not measured" if mmseg_python is None else "measured",
        "goals": GOALS,
    }
    if mmseg_python:
        result["ratios"] = {
            f"{name}/mmsegmentation": statistics.median(
                mine / theirs for mine, theirs in zip(rates[name], rates["mmsegmentation"], strict=True)
            )
            for name in ("ours", "system")
        }
    return rounded(result)


# ---- ours --------------------------------------------------------------------------------------------------------


def ours(root: Path, steps: int, warm: int, allocator: str = "calm", more: list[str] | None = None) -> dict[str, Any]:
    """The command `ssaseg train`. Its log has the images per second of the steps between two lines."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "own.yaml")
        names = sorted(path.stem for path in (root / "images/val").iterdir())[:2]  # evaluation is not measured
        listed = Path(folder, "names.txt")
        listed.write_text("".join(f"{name}\n" for name in names))
        recipe.write_text(
            f"extends: _segnext_t\n"
            f"model: {{classifier: linear, pretrained: null}}\n"
            f"data:\n"
            f"  root: {json.dumps(str(root))}\n"
            f"  classes: {json.dumps([str(k) for k in range(255)][: 255 if more else CLASSES])}\n"
            f"  train: {{images: images/train, masks: annotations/train}}\n"
            f"  val: {{images: images/val, masks: annotations/val, names: {json.dumps(str(listed))}}}\n"
            f"augment: {{scale: {list(SCALE)}, ratio: {list(RATIO)}, crop: {list(CROP)}}}\n"
            f"train: {{steps: {steps}, batch: {BATCH}, workers: {WORKERS}, log_every: {warm}, "
            f"eval_every: 100000, save_every: 100000}}\n"
        )
        command = [
            sys.executable,
            "-m",
            "ssaseg",
            "train",
            str(recipe),
            "--out",
            f"{folder}/run",
            "--device",
            "cpu",
        ]
        environment = {**os.environ, "SSASEG_ALLOCATOR": allocator}
        before = children()
        subprocess.run([*command, *(more or [])], check=True, env=environment, capture_output=True)
        used = children() - before
        lines = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
        # The first line is that of the warm steps.
        timed = [line["images_per_s"] for line in lines if "images_per_s" in line][1:]
        about = json.loads(Path(folder, "run/env.json").read_text())
    return {
        "images/s": statistics.harmonic_mean(timed),
        "processor [ms]": used / steps / BATCH * 1e3,
        "versions": {
            "python": about["python"],
            "torch": about["torch"],
            "opencv": about["packages"]["opencv-python-headless"],
        },
    }


def children() -> float:
    """Working time of all processes that this one has started and that have ended [s]."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def input_path(root: Path, images: int) -> dict[str, float]:
    """Milliseconds of one thread for an image: in a worker with and without distortion, and what remains for the main
    process.
    """
    import cv2
    import torch

    from ssaseg.datasets.colour import prepare_batch
    from ssaseg.datasets.loader import TrainWork
    from ssaseg.datasets.pairs import PairDataset
    from ssaseg.datasets.transforms import TrainTransform

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    dataset = PairDataset(root / "images/train", root / "annotations/train", [str(k) for k in range(255)])
    sides = {
        here: TrainWork(dataset, TrainTransform(SCALE, RATIO, CROP, distort_here=here), 0) for here in (True, False)
    }
    spent: dict[str, float] = defaultdict(float)
    batches = [[(i, i % len(dataset)) for i in range(first, first + BATCH)] for first in range(0, images, BATCH)]
    for samples in batches:
        for here, work in sides.items():
            started = time.process_time()
            batch = work[samples]
            spent[f"worker, {'with' if here else 'without'} distortion [ms]"] += time.process_time() - started
            if here:
                started = time.process_time()
                prepare_batch(batch, (120.0,) * 3, (60.0,) * 3, torch.device("cpu"))
                spent["main process [ms]"] += time.process_time() - started
    result = {name: seconds / images * 1e3 for name, seconds in spent.items()}
    with_, without = (result[f"worker, {word} distortion [ms]"] for word in ("with", "without"))
    return {**result, "distortion [ms]": with_ - without}


# ---- mmsegmentation ----------------------------------------------------------------------------------------------


def mmseg(python: Path, root: Path, steps: int, warm: int) -> dict[str, Any]:
    before = children()
    words = [str(python), __file__, "--as-mmseg", str(steps), "--warm", str(warm), "--root", str(root)]
    result = subprocess.run(words, check=True, capture_output=True, text=True)
    return {
        **json.loads(result.stdout.splitlines()[-1]),
        "processor [ms]": (children() - before) / steps / BATCH * 1e3,
    }


def train_mmseg(root: Path, steps: int, warm: int) -> dict[str, Any]:
    """mmsegmentation's runner with its configuration of SegNeXt-T, changed to our protocol."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fixtures"))
    from make_mmseg_stub import stub_mmcv_ops

    stub_mmcv_ops()
    import mmseg
    import torch
    from mmengine import Config
    from mmengine.hooks import Hook
    from mmengine.runner import Runner
    from mmseg.utils import register_all_modules

    register_all_modules()
    file = Path(mmseg.__file__).parent / ".mim/configs/segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py"
    config = Config.fromfile(file)
    config.model.backbone.init_cfg = None
    config.model.data_preprocessor.size = CROP
    config.model.decode_head.num_classes = CLASSES
    config.train_dataloader = {
        "batch_size": BATCH,
        "num_workers": WORKERS,
        "persistent_workers": True,
        "sampler": {"type": "InfiniteSampler", "shuffle": True},
        "dataset": {
            "type": "BaseSegDataset",
            "data_root": str(root),
            "data_prefix": {"img_path": "images/train", "seg_map_path": "annotations/train"},
            "img_suffix": ".jpg",
            "seg_map_suffix": ".png",
            "metainfo": {"classes": [str(k) for k in range(CLASSES)]},
            "reduce_zero_label": False,
            "pipeline": [
                {"type": "LoadImageFromFile"},
                {"type": "LoadAnnotations"},
                {"type": "RandomResize", "scale": SCALE, "ratio_range": RATIO, "keep_ratio": True},
                {"type": "RandomCrop", "crop_size": CROP, "cat_max_ratio": 0.75},
                {"type": "RandomFlip", "prob": 0.5},
                {"type": "PhotoMetricDistortion"},
                {"type": "PackSegInputs"},
            ],
        },
    }
    config.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": steps}
    for key in ("val_cfg", "val_dataloader", "val_evaluator", "test_cfg", "test_dataloader", "test_evaluator"):
        config[key] = None
    config.default_hooks.pop("checkpoint", None)
    config.default_hooks.logger.interval = warm
    ends: list[float] = []

    class Clock(Hook):
        def after_train_iter(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config.work_dir = folder
        runner = Runner.from_cfg(config)
        runner.register_hook(Clock(), "LOWEST")
        runner.train()
    return {
        "images/s": (len(ends) - warm) * BATCH / (ends[-1] - ends[warm - 1]),
        "versions": {"mmsegmentation": mmseg.__version__, "its torch": torch.__version__},
    }


if __name__ == "__main__":
    main()
