"""`ssaseg video` from file to file: frames a second, where the time goes, and resident memory over an hour.

    python benchmarks/video.py speed --images ../shared/data/camvid/images/val    # writes benchmarks/results/video.json
    python benchmarks/video.py memory --images ../shared/data/camvid/images/val   # adds the other part to it
    python benchmarks/video.py --smoke                                 # both, small and quick; writes nothing

speed: SeaFormer-S with SSA and the weights of benchmarks/weights on a video of 480×360 (H.264), which pans over
pictures of --images, or over built-in scenes. Two threads on two cores. The sides run in turn: back ends, without and
with `--smooth 0.7`, and with `--motion` too; a speed is the median of the rounds. Times are of the run, from the first
frame to the last, without the start of the program and the export of the network. `stages` are those of `--timings`,
processor time a frame, of the last round.

memory: 90,000 frames, an hour at 25 a second, of 96×64, with sound, by `--every 10 --smooth 0.5`: the network labels
9,000 of them; frames are small, so that the hour passes in minutes. Slope by least squares over the last half. FFmpeg
keeps the table of all frames of an .mp4 file in memory until it writes it at the end; .mkv files have none.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import cv2
import numpy as np
import psutil
import torch
from loader_memory import slope
from networks import processor, rounded
from predict import CORES, SHIPPED, STAGE, random_checkpoint

from ssaseg.cli.video import run
from ssaseg.datasets.exporting import export_scenes
from ssaseg.models import load_model

RESULTS = Path(__file__).parent / "results" / "video.json"
GOAL = 25.0  # frames a second, with the fastest back end
LONG = 30  # frames of one picture
DONE = re.compile(r"wrote .*: (\d+) frames, ([\d.]+) frames/s")
SMOOTHING = {"plain": [], "smooth": ["--smooth", "0.7"], "smooth, motion": ["--smooth", "0.7", "--motion"]}
EVERY = 10


# ---- videos ------------------------------------------------------------------------------------------------------


def pictures(source: Path | None, folder: Path, count: int) -> list[np.ndarray]:
    """Pictures to pan over: those of `source`, or built-in scenes."""
    files = (
        export_scenes(folder / "scenes", count, height=360, width=480) if source is None else sorted(source.iterdir())
    )
    return [cv2.imread(str(file)) for file in files[:count]]


def panned(images: list[np.ndarray], size: tuple[int, int]) -> Iterator[np.ndarray]:
    """`LONG` frames of this size (height, width) of each picture, which moves by a pixel or two."""
    height, width = size
    for image in images:
        large = cv2.resize(image, (width + 2 * LONG, height + LONG), interpolation=cv2.INTER_CUBIC)
        for step in range(LONG):
            yield np.ascontiguousarray(large[step : step + height, 2 * step : 2 * step + width])


def write_video(path: Path, frames: list[np.ndarray], count: int, sound: bool = False, **options: str) -> Path:
    """A video of `count` frames, 25 a second: the frames again and again; with a tone."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"crf": "20", **options})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        tone: Any = container.add_stream("aac", rate=8000) if sound else None
        pieces = 0
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(frames[number % len(frames)], format="bgr24")
            container.mux(stream.encode(frame))
            while tone is not None and pieces * 1024 < (number + 1) * 320:
                wave = np.sin(np.arange(1024) / 5).astype(np.float32)[None]
                piece = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
                piece.sample_rate, piece.pts, piece.time_base = 8000, pieces * 1024, Fraction(1, 8000)
                container.mux(tone.encode(piece))
                pieces += 1
        container.mux(stream.encode())
        if tone is not None:
            container.mux(tone.encode())
    return path


# ---- speed -------------------------------------------------------------------------------------------------------


def once(weights: Path, video: Path, out: Path, *words: str) -> tuple[float, str]:
    """Frames a second of one run, and what it printed."""
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "ssaseg", "video", str(weights), str(video), "--out", str(out), "--device", "cpu"]
    surroundings = os.environ | {"OMP_NUM_THREADS": str(CORES)}
    ended = subprocess.run([*command, "--timings", *words], capture_output=True, text=True, env=surroundings)
    found = DONE.search(ended.stdout)
    if ended.returncode or not found:
        raise SystemExit(f"video {' '.join(words)} failed:\n{ended.stdout[-1000:]}{ended.stderr[-1000:]}")
    return float(found[2]), ended.stdout


def measure_speed(weights: Path, video: Path, folder: Path, backends: list[str], rounds: int) -> dict[str, Any]:
    """All sides in turn."""
    speeds: dict[str, list[float]] = {}
    printed: dict[str, str] = {}
    for backend in backends[1:]:  # the export is kept
        once(weights, video, folder / "first.mp4", "--backend", backend, "--limit", "4")
    for _ in range(rounds):
        for backend in backends:
            for name, words in SMOOTHING.items():
                side = f"{backend}, {name}"
                speed, printed[side] = once(weights, video, folder / "out.mp4", "--backend", backend, *words)
                speeds.setdefault(side, []).append(speed)
                print(f"  {side}: {speed:.1f} frames/s", file=sys.stderr, flush=True)
    sides = {}
    for side, found in speeds.items():
        stages = {
            name: {"ms a frame": float(ms), "%": float(share)} for name, ms, share in STAGE.findall(printed[side])
        }
        flicker = next(line for line in printed[side].splitlines() if line.startswith("flicker"))
        sides[side] = {"frames/s": statistics.median(found), "all": found, "stages": stages, "flicker": flicker}
    best = max(sides, key=lambda side: sides[side]["frames/s"] if side.endswith("plain") else 0)
    print(f"fastest: {best}, {sides[best]['frames/s']:.1f} frames/s, goal {GOAL:g}")
    for side, each in sides.items():
        spent = ", ".join(f"{name} {of['ms a frame']:.1f} ms" for name, of in each["stages"].items())
        print(f"{side}: {each['frames/s']:.1f} frames/s; {spent}; {each['flicker']}")
    return {"fastest": best, "goal [frames/s]": GOAL, "sides": sides}


# ---- memory ------------------------------------------------------------------------------------------------------


def measure_memory(weights: Path, video: Path, out: Path, every: int) -> dict[str, Any]:
    """The resident set of this process during a run, read every `every` frames."""
    process, at, kib = psutil.Process(), [0], [0.0]

    @contextlib.contextmanager
    def reading(total: int | None, verb: str, what: str) -> Iterator[Callable[[int], object]]:
        done = 0

        def advance(frames: int) -> None:
            nonlocal done
            done += frames
            if frames and done % every == 0:
                at.append(done)
                kib.append(process.memory_info().rss / 1024)
                if len(at) % 20 == 0:
                    print(f"  {done} frames: {kib[-1] / 1024:.1f} MiB", file=sys.stderr, flush=True)

        yield advance

    request = run.Request(every=EVERY, smooth=0.5, backend="torch")
    with patch.object(run, "progress_bar", reading):
        code = run.run_video(weights, str(video), out, request, "cpu")
    assert code == 0
    del at[0], kib[0]
    marks = {share: round(kib[int(share * (len(kib) - 1))] / 1024, 1) for share in (0.1, 0.5, 1.0)}
    found = slope(at, kib) * 1000
    print(f"{out.suffix}, {at[-1]} frames: {marks} MiB at these shares; {found:.2f} KiB per 1,000 frames at the end")
    return {
        "frames": at[-1],
        "options": f"--every {EVERY} --smooth 0.5 --backend torch, with sound",
        "resident set [MiB] at this share of the run": marks,
        "slope [KiB per 1,000 frames], last half": found,
    }


def main() -> None:
    """Measures what is asked for, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["speed", "memory"], help="default: both")
    parser.add_argument("--images", type=Path, help="folder of pictures to pan over; default: built-in scenes")
    parser.add_argument("--frames", type=int, default=300, help="frames of the video for speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hour", type=int, default=90_000, help="frames of the video for memory")
    parser.add_argument("--smoke", action="store_true", help="small and quick; writes nothing")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    backends = ["torch"] + ["onnxruntime"] * (find_spec("onnxruntime") is not None)
    weights, size, small, every = SHIPPED, (360, 480), (64, 96), 250
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["SSASEG_CACHE"] = str(folder / "cache")
        if options.smoke:
            header = load_model(SHIPPED)[1]
            known = {key: header[key] for key in ("classes", "palette", "mean", "std", "protocol")}
            weights, size, small, every = random_checkpoint(folder, "seaformer_t", known), (64, 96), (64, 96), 4
            options.frames, options.rounds, options.hour, backends = 12, 1, 40, ["torch"]
            SMOOTHING.pop("smooth")
        images = pictures(options.images, folder, 10)
        if options.part != "memory":
            frames = [*panned(images, size)]
            video = write_video(folder / "in.mp4", frames, options.frames, preset="medium")
            found["speed"] = {"size (height, width)": size, "frames": options.frames}
            found["speed"] |= measure_speed(weights, video, folder, backends, options.rounds)
        if options.part != "speed":
            frames = [*panned(images, small)]
            video = write_video(folder / "hour.mp4", frames, options.hour, sound=True, preset="ultrafast")
            found["memory"] = {"size (height, width)": small} | {
                suffix: measure_memory(weights, video, folder / f"memory{suffix}", every) for suffix in (".mkv", ".mp4")
            }
    if options.smoke:
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    about = {
        "command": "python benchmarks/video.py PART --images CAMVID/images/val",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "av": av.__version__},
        "on": processor("cpu"),
        "cores": CORES,
    }
    if "speed" in found:
        found["speed"]["load average"] = os.getloadavg()[0]
    RESULTS.write_text(json.dumps(results | about | rounded(found), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
