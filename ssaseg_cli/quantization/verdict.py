"""Whether a quantised network is as good as before: mIoU with the paired interval of its change, classes, speed, size.

Axes: N images, K classes.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ssaseg.cli.console import print_table
from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.engines import Engine
from ssaseg.cli.scoring.metrics import Confusion, Interval, difference_interval

WARM = 12  # rounds that are not counted: engines choose faster code for a size that is repeated
REFERENCE = "onnxruntime"  # the runtime whose float32 is the measure of speed


class Limits(NamedTuple):
    """What quantisation may cost at most [points]: of the mIoU, and of the IoU of a class."""

    drop: float
    class_drop: float


class Verdict(NamedTuple):
    """Scores before and after, in percent; changes in points, negative if worse."""

    before: float
    after: float
    interval: Interval | None  # of the change, paired: both networks on the same images
    classes: list[tuple[str, float, float]]  # name, IoU before and after; of labelled classes only
    excess: str  # empty, or what drops more than the limits allow

    @property
    def passes(self) -> bool:
        """Whether the drops are within the limits."""
        return not self.excess

    @property
    def change(self) -> float:
        """Of the mIoU [points]."""
        return self.after - self.before


def judge(before: Confusion, after: Confusion, classes: Sequence[str], limits: Limits) -> Verdict:
    """Compares the predictions of two networks on the same images, in the same order."""
    old, new = before.scores(), after.scores()
    labelled = np.flatnonzero(before.matrix.sum(axis=1)).tolist()  # each of them has an IoU before and after
    rows = [(classes[k], float(old["IoU"][k]), float(new["IoU"][k])) for k in labelled]
    change = new["mIoU"] - old["mIoU"]
    excess = []
    # Not `>`: a change that is not a number is none that is allowed.
    if not -change <= limits.drop:
        excess.append(f"the mIoU drops by {-change:.2f} points (allowed {limits.drop:g})")
    for name, was, became in sorted(rows, key=lambda row: row[2] - row[1]):
        if not was - became <= limits.class_drop:
            excess.append(f"{name} by {was - became:.2f} (allowed {limits.class_drop:g})")
    text = ", ".join(excess[:4]) + (f", and {len(excess) - 4} more classes" if len(excess) > 4 else "")
    return Verdict(old["mIoU"], new["mIoU"], difference_interval(before, after), rows, text)


def print_verdict(verdict: Verdict, images: int) -> None:
    """Prints the IoU per class, the mIoU and the paired interval of its change."""
    rows = [(name, f"{was:.2f}", f"{became:.2f}", f"{became - was:+.2f}") for name, was, became in verdict.classes]
    print_table(("class", "float32 [%]", "int8 [%]", "change [points]"), rows)
    sure = ""
    if verdict.interval is not None:
        level, low, high = verdict.interval.level, verdict.interval.low, verdict.interval.high
        sure = f", {level:g} % interval {low:+.2f} to {high:+.2f} (paired bootstrap over {images} images)"
    echo(f"mIoU {verdict.before:.2f} % → {verdict.after:.2f} %: change {verdict.change:+.2f} points{sure}")


# ---- speed -------------------------------------------------------------------------------------------------------


class Speed(NamedTuple):
    """Times of one image, all sides in turn."""

    times: dict[str, tuple[float, float]]  # medians [ms] in float32 and in int8, by runtime
    size: tuple[int, int]  # of the image: height, width
    threads: int
    rounds: int

    def ratio(self, runtime: str = REFERENCE) -> float:
        """How many times as fast int8 in this runtime is as float32 in ONNX Runtime."""
        return self.times[REFERENCE][0] / self.times[runtime][1]

    def lines(self) -> Iterator[str]:
        """The times of each runtime, for people."""
        for runtime, (before, after) in self.times.items():
            compared = "as float32" if runtime == REFERENCE else f"as float32 in {REFERENCE}"
            yield (
                f"{runtime}: float32 {before:.1f} ms, int8 {after:.1f} ms an image; int8 is {self.ratio(runtime):.2f} "
                f"times as fast {compared}"
            )
        height, width = self.size
        yield f"  {height} x {width} pixels, {self.threads} threads, medians of {self.rounds} rounds in turn"


def measure_speed(engines: Mapping[str, tuple[Engine, Engine]], pixels: Tensor, threads: int, seconds: float) -> Speed:
    """Times engines, in float32 and in int8, by runtime, on pixels (1,C,h,w): at least three rounds, after WARM."""
    sides = [engine for pair in engines.values() for engine in pair]
    rounds: list[list[float]] = []
    started = time.perf_counter()
    while len(rounds) < WARM + 3 or time.perf_counter() - started < seconds:
        rounds.append([_milliseconds(engine, pixels) for engine in sides])
    medians = iter([median(column) for column in zip(*rounds[WARM:], strict=True)])
    height, width = pixels.shape[2:]
    times = {runtime: (next(medians), next(medians)) for runtime in engines}
    return Speed(times, (height, width), threads, len(rounds) - WARM)


def _milliseconds(engine: Engine, pixels: Tensor) -> float:
    started = time.perf_counter()
    engine.logits(pixels)
    return 1e3 * (time.perf_counter() - started)


def as_json(verdict: Verdict, speed: Speed) -> dict[str, Any]:
    """The verdict for `--json`."""
    return {
        "mIoU_before": verdict.before,
        "mIoU_after": verdict.after,
        "change": verdict.change,
        "change_interval": None if verdict.interval is None else verdict.interval._asdict(),
        "classes": [{"name": name, "before": was, "after": became} for name, was, became in verdict.classes],
        "passes": verdict.passes,
        "excess": verdict.excess,
        "speed": {**speed._asdict(), "ratios": {runtime: speed.ratio(runtime) for runtime in speed.times}},
    }
