"""`ssaseg predict`: now, as it was before, with other runtimes, and against mmsegmentation 1.2.2 and Ultralytics.

    python benchmarks/predict.py --images ../shared/data/camvid/images/val --mmseg-python PYTHON \
        --ultralytics-python PYTHON                    # writes benchmarks/results/predict.json; --case: only a part
    python benchmarks/predict.py --smoke               # small and quick, writes nothing

Protocol: 2 threads on 2 cores; 120 JPEG frames of 480×360, repeated where there are fewer, and 60 that are these frames
at 1920×1080 (24 for SegNeXt-T); without --images built-in scenes. Each side reads the frames and writes a PNG of class
numbers for each. SeaFormer-S with SSA has the weights of benchmarks/weights; SegNeXt-T with the plain classifier has
random ones, the same in mmsegmentation. Times are of the run, from the first file to the last, without the start of the
program and the reading of the weights. The sides run in turn; a ratio is the median of the rounds' ratios. `now` is
`--backend torch`. `before` is `--exact` with the system's allocator: one image after the other, all cores on each,
norms not folded. Other back ends are `--backend NAME`; their export is made before. Ultralytics' network has random
weights; the sides of its input are those of the image, rounded up to multiples of 32.

`start`: the whole command for one image, against `import torch` alone. `stages`: what --timings says of `now`.
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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from network_sides import Case as Network
from network_sides import official_weights, our_network
from networks import Worker, processor, rounded

from ssaseg.datasets.exporting import export_scenes
from ssaseg.models import load_model, save_model

RESULTS = Path(__file__).parent / "results" / "predict.json"
SHIPPED = Path(__file__).parent / "weights" / "camvid-seaformer_s-ssa.safetensors"
PEERS = Path(__file__).with_name("predict_sides.py")
SMALL, LARGE = (360, 480), (1080, 1920)  # height and width [pixels]
CORES = 2
# Ratio of images a second: now to the other side.
GOALS = {"mmseg": 3.0, "before": 1.5, "ultralytics": 1.0}
BACKENDS = ("onnxruntime", "openvino")
# The networks that other programs are measured beside: mmsegmentation has no SeaFormer; Ultralytics' is its own.
AGAINST = {"mmseg": ("segnext_t",), "ultralytics": ("seaformer_s",)}
COMMAND = "from ssaseg.cli.main import cli; cli()"
DONE = re.compile(r"labelled (\d+) of \d+ images in ([\d.]+) s \(([\d.]+) images/s\)")
STAGE = re.compile(r"^ *(\w+) {2,}.*?([\d.]+) +([\d.]+) *$", re.MULTILINE)


@dataclass
class Case:
    """Frames of one size and a network."""

    name: str
    model: str
    weights: Path
    folder: Path
    size: tuple[int, int]
    rounds: int
    speeds: dict[str, list[float]] = field(default_factory=dict)  # images a second

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())


# ---- frames and weights ------------------------------------------------------------------------------------------


def make_frames(source: Path | None, folder: Path, count: int, size: tuple[int, int]) -> Path:
    """`count` JPEG frames of this size in `folder`: those of `source`, again and again, or scenes."""
    folder.mkdir(parents=True)
    if source is None:
        files = export_scenes(folder.with_name("scenes"), min(count, 12), height=SMALL[0], width=SMALL[1])
    else:
        files = sorted(file for file in source.rglob("*") if file.suffix in {".jpg", ".png"})
    for index in range(count):
        file, target = files[index % len(files)], folder / f"{index:03}.jpg"
        image = cv2.imread(str(file))
        if source is not None and file.suffix == ".jpg" and image.shape[:2] == size:
            target.write_bytes(file.read_bytes())
            continue
        cv2.imwrite(
            str(target), cv2.resize(image, size[::-1], interpolation=cv2.INTER_CUBIC), [cv2.IMWRITE_JPEG_QUALITY, 92]
        )
    return folder


def random_checkpoint(folder: Path, name: str, header: dict[str, Any]) -> Path:
    """A checkpoint of random weights, and the same weights under mmsegmentation's names beside it."""
    model = our_network(Network(name, "linear", len(header["classes"]), 256))
    path = folder / f"{name}.safetensors"
    save_model(path, model, header)
    tensors = official_weights(model)[""]
    torch.save({"state_dict": tensors, "meta": {}}, path.with_suffix(".pth"))
    return path


# ---- the sides ---------------------------------------------------------------------------------------------------


def ours(case: Case, out: Path, *options: str, **environment: str) -> tuple[float, str]:
    """Images a second of `ssaseg predict`, and what it printed."""
    command = [sys.executable, "-c", COMMAND, "predict", str(case.weights), str(case.folder), "--out", str(out)]
    surroundings = os.environ | {"OMP_NUM_THREADS": str(CORES)} | environment
    ended = subprocess.run([*command, "--device", "cpu", *options], capture_output=True, text=True, env=surroundings)
    found = DONE.search(ended.stdout)
    if ended.returncode or not found:
        raise SystemExit(f"predict {' '.join(options)} failed:\n{ended.stdout[-1000:]}{ended.stderr[-1000:]}")
    images, seconds, speed = map(float, found.groups())
    return speed if speed > 10 else images / seconds, ended.stdout


class Peer:
    """Another program: predict_sides.py in its interpreter."""

    def __init__(self, side: str, python: Path, folder: Path) -> None:
        self.worker = Worker(side, python, folder, at=PEERS)

    def prepare(self, case: Case) -> None:
        classes = load_model(case.weights)[0].num_classes
        given = {"network": case.model, "classes": classes, "weights": str(case.weights.with_suffix(".pth"))}
        self.worker.ask("build", **given)

    def label(self, case: Case, out: Path) -> float:
        files = [str(file) for file in case.files]
        return len(files) / self.worker.ask("label", files=files, out=str(out), size=case.size)


@contextmanager
def peers(pythons: dict[str, Path | None], folder: Path) -> Iterator[dict[str, Peer]]:
    """The other programs that can run on this machine."""
    with ExitStack() as stack:
        found = {side: Peer(side, python, folder) for side, python in pythons.items() if python}
        for peer in found.values():
            stack.callback(peer.worker.close)
        yield found


# ---- measuring ---------------------------------------------------------------------------------------------------


def measure(case: Case, others: dict[str, Peer], backends: list[str], folder: Path) -> dict[str, Any]:
    """Images a second of all sides, in turn; ratios; equal labels; the stages of our run."""
    others = {side: peer for side, peer in others.items() if case.model in AGAINST[side]}
    for peer in others.values():
        peer.prepare(case)
    printed, exports = "", {}
    for side in backends:  # the export is kept
        began = time.perf_counter()
        ours(replace(case, folder=case.files[0]), folder / "first", "--backend", side)
        exports[side] = time.perf_counter() - began
    for _ in range(case.rounds):
        for side in ("now", "before", *backends, *others):
            out = folder / f"out-{case.name}-{side}"
            if side in others:
                speed = others[side].label(case, out)
            elif side == "now":
                speed, printed = ours(case, out, "--backend", "torch", "--timings")
            elif side == "before":
                speed, _ = ours(case, out, "--exact", SSASEG_ALLOCATOR="system")
            else:
                speed, _ = ours(case, out, "--backend", side)
            case.speeds.setdefault(side, []).append(speed)
            print(f"  {case.name} {side}: {speed:.1f} images/s", file=sys.stderr, flush=True)
    speeds = {side: statistics.median(found) for side, found in case.speeds.items()}
    best = max(("now", *backends), key=lambda side: speeds[side])
    return {
        "images": len(case.files),
        "size (height, width)": case.size,
        "images/s": speeds,
        "all images/s": case.speeds,
        "now/it": {side: ratio(case, "now", side) for side in speeds if side != "now"},
        "best": best,
        "best/it": {side: ratio(case, best, side) for side in ("before", *others)},
        "labels equal to before": {
            side: equal_labels(folder / f"out-{case.name}-before", folder / f"out-{case.name}-{side}")
            for side in speeds
            if side not in ("before", "ultralytics")
        },
        "stages": {name: {"ms an image": float(ms), "%": float(share)} for name, ms, share in STAGE.findall(printed)},
        "first image with export [s]": exports,
        "bound by": next(line for line in printed.splitlines() if line.startswith("bound by")),
    }


def ratio(case: Case, side: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(case.speeds[side], case.speeds[other], strict=True))


def equal_labels(one: Path, other: Path) -> float:
    """Share of equal class numbers in the PNG files of two folders, which have the same order."""
    pairs = zip(sorted(one.rglob("*.png")), sorted(other.rglob("*.png")), strict=True)
    return statistics.mean(float((pixels(a) == pixels(b)).mean()) for a, b in pairs)


def pixels(file: Path) -> np.ndarray:
    from PIL import Image

    return np.array(Image.open(file))


def measure_start(case: Case, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of the whole command for one image, and of `import torch`, in turn."""
    words = ["predict", str(case.weights), str(case.files[0]), "--out", str(folder / "start"), "--device", "cpu"]
    commands = {"predict": ["-c", COMMAND, *words], "import torch": ["-c", "import torch"]}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(-1, rounds):  # the first fills the system's cache
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    return {
        "median [s]": medians,
        "all [s]": times,
        "beyond import torch [s]": medians["predict"] - medians["import torch"],
    }


def show(name: str, found: dict[str, Any]) -> None:
    print(f"{name}: {found['images']} images of {found['size (height, width)']}")
    for side, speed in found["images/s"].items():
        by = found["now/it"].get(side)
        goal = f" (goal {GOALS[side]:g}, {'met' if by >= GOALS[side] else 'MISSED'})" if by and side in GOALS else ""
        print(f"  {side:12}{speed:7.2f} images/s" + (f"; now/it {by:.2f}{goal}" if by else ""))
    best = found["best/it"]["before"]
    print(f"  best: {found['best']}, {best:.2f} × before (goal 2.5)")
    print("  equal labels: " + ", ".join(f"{k} {100 * v:.3f} %" for k, v in found["labels equal to before"].items()))
    print(
        "  " + ", ".join(f"{stage} {of['%']:.0f} %" for stage, of in found["stages"].items()) + f"; {found['bound by']}"
    )


def main() -> int:
    """Measures, prints, writes; returns 1 if our labels are not nearly those of `--exact`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of frames of 480×360; default: built-in scenes")
    parser.add_argument("--mmseg-python", type=Path, help="Python interpreter with mmsegmentation 1.2.2")
    parser.add_argument("--ultralytics-python", type=Path, help="Python interpreter with ultralytics")
    parser.add_argument("--case", action="append", help="only these cases, such as small-seaformer_s; repeatable")
    parser.add_argument("--smoke", action="store_true", help="small and quick; writes nothing")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    backends = [name for name in BACKENDS if find_spec(name) and not options.smoke]
    pythons = {"mmseg": options.mmseg_python, "ultralytics": options.ultralytics_python}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ |= {"SSASEG_CACHE": str(folder / "cache"), "YOLO_CONFIG_DIR": temporary, "YOLO_OFFLINE": "true"}
        cases = make_cases(options, folder)
        with peers(pythons, folder) as others:
            for case in cases:
                found[case.name] = measure(case, others, backends, folder)
                show(case.name, found[case.name])
            versions = {name: peer.worker.ask("about") for name, peer in others.items()}
        start = measure_start(cases[0], folder, 5) if cases[0].name == "small-seaformer_s" else None
    if start:
        print(f"one image: {start['beyond import torch [s]']:.2f} s beyond `import torch` (goal 2)")
    if not options.smoke:
        write(
            options,
            found,
            start,
            versions,
            [side for side in (*pythons, *BACKENDS) if side not in [*others, *backends]],
        )
    wrong = [name for name, each in found.items() if each["labels equal to before"]["now"] < 0.995]
    print(f"labels DIFFER from those of --exact: {wrong}" if wrong else "the labels are those of --exact")
    return bool(wrong)


def make_cases(options: argparse.Namespace, folder: Path) -> list[Case]:
    """All cases, or those that were asked for, with their frames and weights."""
    header = load_model(SHIPPED)[1]
    known = {key: header[key] for key in ("classes", "palette", "mean", "std", "protocol")}
    if options.smoke:
        GOALS.clear()  # they are for many and larger images
        frames = make_frames(None, folder / "frames", 4, (64, 96))
        weights = random_checkpoint(folder, "seaformer_t", known)
        return [Case("smoke", "seaformer_t", weights, frames, (64, 96), 1)]
    segnext = random_checkpoint(folder, "segnext_t", known)
    small = make_frames(options.images, folder / "small", 120, SMALL)
    large, few = (make_frames(options.images, folder / f"large{count}", count, LARGE) for count in (60, 24))
    cases = [
        Case("small-seaformer_s", "seaformer_s", SHIPPED, small, SMALL, 3),
        Case("small-segnext_t", "segnext_t", segnext, small, SMALL, 2),
        Case("large-seaformer_s", "seaformer_s", SHIPPED, large, LARGE, 1),
        Case("large-segnext_t", "segnext_t", segnext, few, LARGE, 1),
    ]
    return [case for case in cases if case.name in (options.case or [case.name])]


def write(
    options: argparse.Namespace, found: dict[str, Any], start: dict[str, Any], versions: Any, missing: list[str]
) -> None:
    """Writes the results; keeps those of cases that were not measured now."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    command = "python benchmarks/predict.py" + " --images CAMVID/images/val" * (options.images is not None)
    command += " --mmseg-python PYTHON" * bool(options.mmseg_python)
    command += " --ultralytics-python PYTHON" * bool(options.ultralytics_python)
    results |= {
        "command": command,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **versions},
        "on": processor("cpu"),
        "cores": CORES,
        "load average": os.getloadavg()[0],
        "not measured": missing,
        "start": rounded(start) or results.get("start"),
        "cases": results.get("cases", {}) | rounded(found),
    }
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
