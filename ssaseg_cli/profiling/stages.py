"""What one image spends its time on, from the file to the file of its labels, stage by stage.

The stages run one after the other, with a wait after each. Beside their sum stands the whole: the same image through
the code of `ssaseg predict`, without any wait inside. If the two differ, a stage is missing or waits cost time.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from ssaseg.cli.profiling.latency import now, rounds
from ssaseg.cli.profiling.memory import Peaks
from ssaseg.cli.profiling.scene import Picture
from ssaseg.cli.results.kinds import encode_indices, style_of
from ssaseg.cli.scoring.engines import Engine, TorchEngine
from ssaseg.cli.scoring.inference import Inference
from ssaseg.datasets import default_palette
from ssaseg.files.writing import write_atomic
from ssaseg.models.labelling import label_map
from ssaseg.models.masks.base import MaskSegmenter

READING, PREPROCESSING, LABELS = "reading", "preprocessing", "upsampling and arg-max"
ENCODING, WRITING = "encoding", "writing"

Steps = Sequence[tuple[str, Callable[[Any], Any]]]


def network_steps(engine: Engine) -> Steps:
    """The stages from pixels (N,C,h,w) to logits (N,K,·,·) float32; one for all if another runtime computes."""
    if not isinstance(engine, TorchEngine):
        return [("network", lambda pixels: engine.logits(pixels).final)]
    model = engine.model
    last = ("classifier", lambda feature: model.classifier.stages(feature)[0].float())
    if isinstance(model, MaskSegmenter):  # which pads the image before, and notes its size after
        return [("backbone and decoder", model.feature), last]
    return [("backbone", model.maps), ("decoder", model.decoder), last]


def precision_of(engine: Engine) -> AbstractContextManager[Any]:
    """Inside this context the steps compute as the engine does."""
    dtype = engine.dtype if isinstance(engine, TorchEngine) else torch.float32
    return torch.autocast(engine.device.type, dtype, enabled=dtype != torch.float32)


class Pass:
    """One image from file to file, by one engine."""

    def __init__(self, engine: Engine, metadata: Mapping[str, Any], picture: Picture) -> None:
        self.engine, self.metadata, self.picture = engine, metadata, picture
        self.inference = Inference(engine, picture.protocol, metadata["mean"], metadata["std"])
        palette = metadata.get("palette") or default_palette(metadata["classes"])
        self.style = style_of(metadata["classes"], palette)
        self.steps = network_steps(engine)

    @torch.inference_mode()
    def staged(self, done: Callable[[str], object]) -> None:
        """Runs stage after stage; calls `done` with the name of each after it."""
        image = self.picture.read()
        if self.picture.path is not None:
            done(READING)
        value: Any = self.picture.prepare(image, self.metadata, self.engine.device, self.engine.takes)
        middle = tuple(value.shape[2:])
        done(PREPROCESSING)
        with precision_of(self.engine):
            for name, step in self.steps:
                value = step(value)
                done(name)
        labels = label_map(value, middle, image.shape[:2]).cpu().numpy()
        del value
        done(LABELS)
        content = encode_indices(labels, self.style)
        done(ENCODING)
        self.write(content)
        done(WRITING)

    def whole(self) -> None:
        """The same by the code of `predict`."""
        image = self.picture.read()
        inputs = [torch.from_numpy(each) for each in self.inference.inputs(image, "image")]
        prediction = self.inference.apart().predict(inputs, image.shape[:2], coarse=False)
        self.write(encode_indices(prediction.labels, self.style))

    def write(self, content: bytes) -> None:
        """Writes labels into the temporary folder."""
        write_atomic(self.picture.folder / "labels.png", content, sync=False)


def measure_stages(passes: Sequence[Pass], runs: int) -> list[dict[str, Any]]:
    """Time and memory of each stage, for each of `passes`, which take turns.

    Keys: `rows` with `stage`, `ms` (median), `share` of the sum, and `mib`: the most memory of tensors and arrays that
    the stage holds, with what it was given, without the weights; `sum_ms` of the rows; `whole_ms`: median of the whole.
    """
    spent: list[dict[str, list[float]]] = [defaultdict(list) for _ in passes]
    wholes: list[list[float]] = [[] for _ in passes]
    for run in rounds(runs):
        for each, times, whole in zip(passes, spent, wholes, strict=True):
            device = each.engine.device
            marks = [("", now(device))]
            each.staged(lambda name, marks=marks, device=device: marks.append((name, now(device))))  # type: ignore[misc]
            started = now(device)
            each.whole()
            ended = now(device)
            if run >= 0:
                whole.append(1e3 * (ended - started))
                for (_, before), (name, after) in pairwise(marks):
                    times[name].append(1e3 * (after - before))
    return [
        _stages(each, {name: median(values) for name, values in times.items()}, median(whole))
        for each, times, whole in zip(passes, spent, wholes, strict=True)
    ]


def _stages(each: Pass, times: Mapping[str, float], whole: float) -> dict[str, Any]:
    total, peaks = sum(times.values()), stage_peaks(each)
    return {
        "rows": [
            {"stage": name, "ms": spent, "share": spent / total, "mib": peaks[name] / 2**20}
            for name, spent in times.items()
        ],
        "sum_ms": total,
        "whole_ms": whole,
    }


def stage_peaks(each: Pass) -> dict[str, int]:
    """The most bytes that each stage holds: its input, its results and all between, but no weights."""
    weights = each.engine.model.state_dict().values() if isinstance(each.engine, TorchEngine) else ()
    found: dict[str, int] = {}
    with Peaks(each.engine.device, list(weights)).running() as peaks:
        each.staged(lambda name: found.update({name: peaks.take()}))
    return found
