"""`ssaseg quantize`: calibrates on training images, searches, judges on the validation split, writes or refuses."""

import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ssaseg.cli.console import json_target, progress_bar, write_json
from ssaseg.cli.device import select_device
from ssaseg.cli.engine.exports import cached_export
from ssaseg.cli.engine.graphs import Graph as Runnable
from ssaseg.cli.engine.graphs import GraphEngine, graph_engine
from ssaseg.cli.engine.opening import Opened, open_file
from ssaseg.cli.errors import CommandError
from ssaseg.cli.evaluation.report import (
    open_dataset,
    recipe_of,
    require_channels,
    require_data_classes,
    require_labels,
)
from ssaseg.cli.printing import echo
from ssaseg.cli.quantization.calibration import LOOKED_AT, choose_images, network_inputs
from ssaseg.cli.quantization.graph import Graph
from ssaseg.cli.quantization.search import RANKING, Cost, fewest, rank_layers
from ssaseg.cli.quantization.verdict import (
    REFERENCE,
    Limits,
    Speed,
    Verdict,
    as_json,
    judge,
    measure_speed,
    print_verdict,
)
from ssaseg.cli.scoring.evaluate import WORKERS, evaluate_model, state_protocol
from ssaseg.cli.scoring.metrics import Confusion
from ssaseg.cli.weights.export import NEEDED, Form, make_export, require_packages
from ssaseg.datasets import Dataset
from ssaseg.files.reading import read_file
from ssaseg.files.text import printable
from ssaseg.files.writing import write_atomic
from ssaseg.models.masks.base import MASKS
from ssaseg.recipes import Recipe, parse_protocol

SEARCHED = 8  # of the calibration images, at most, on which layers are ranked
TIMED = 5.0  # seconds that the speed is measured for
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Request:
    """The arguments of the command."""

    checkpoint: Path
    out: Path
    data: str | None = None
    root: Path | None = None
    images: int = 32
    method: str = "minmax"
    minutes: float = 10.0
    opset: int | None = None
    limit: int | None = None
    json_out: str | None = None


class Made(NamedTuple):
    """An int8 network that was scored."""

    content: bytes  # of its ONNX file
    floats: list[str]  # layers that were left in float32, most costly first
    verdict: Verdict


# ---- the command -------------------------------------------------------------------------------------------------
def run_quantize(request: Request, limits: Limits) -> int:
    """Writes `request.out`, an int8 ONNX file, and returns 0.

    Raises CommandError: with exit code 3 and nothing written, if no int8 network is within the limits; with 2 for what
    cannot be quantised, and for data without training split or of other classes; and what opening the files raises.
    """
    json_out = json_target(request.json_out)
    require_destination(request.checkpoint, request.out)
    select_device("cpu")
    opened = open_file(request.checkpoint)
    require_quantisable(opened)
    work = Work(opened, request, limits)
    made = work.full()
    if not made.verdict.passes:
        echo(f"too much: {made.verdict.excess}; searching for the layers that cost most", err=True)
        found = work.search()
        if found is None:
            raise CommandError(work.refusal(made), 3)
        made = found
    speed = work.measure_speed(made)
    write_atomic(request.out, made.content)
    report = work.report(made, speed)
    write_json(json_out, report)
    if json_out != "-":
        print_report(request.out, report, made, speed)
    return 0


def print_report(out: Path, report: dict[str, Any], made: Made, speed: Speed) -> None:
    """Prints the verdict, the layers that stayed float32, speed, size, and the protocol."""
    print_verdict(made.verdict, report["images"])
    layers = f"{report['layers'] - len(made.floats)} of {report['layers']} layers"
    kept = f"; left in float32: {', '.join(made.floats)}" if made.floats else ""
    echo(f"int8: {layers}{kept}")
    for line in speed.lines():
        echo(line)
    if max(map(speed.ratio, speed.times)) < 1:
        echo("warning: int8 is slower than float32 on this CPU; use the checkpoint or its float32 export", err=True)
    before, after = report["MiB_before"], report["MiB_after"]
    echo(f"wrote {out}: {after:.1f} MiB, float32 {before:.1f} MiB; {report['statement']}")


def require_destination(checkpoint: Path, out: Path) -> None:
    """Raises CommandError unless `out` is the name of an ONNX file that can be written, and packages are there."""
    if out.is_dir():
        raise CommandError(f"{out}: is a folder\ngive the name of a file, such as {out / 'int8.onnx'}")
    if out.suffix.lower() != ".onnx":
        raise CommandError(f"{out}: expected a name that ends in .onnx\nint8 networks are written as ONNX files only")
    require_packages(out, NEEDED[".onnx"])
    if out.exists() and out.samefile(checkpoint):
        raise CommandError(f"{out}: is the checkpoint itself\ngive the result another name")
    folder = Path(os.path.realpath(out)).parent
    if not folder.is_dir():
        raise CommandError(f"{out}: no such folder\nmake it first, or give a file in a folder that exists")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CommandError(f"{out}: its folder cannot be written\ngive a file in a folder that can")


def require_quantisable(opened: Opened) -> None:
    """Raises CommandError for a file without a network in PyTorch, and for a mask method."""
    if opened.model is None:
        raise CommandError(
            f"{opened.path}: an export; its layers are not known\nquantise the checkpoint that it was exported from"
        )
    if opened.model.classifier_name == MASKS:
        raise CommandError(
            f"{opened.path}: {opened.model.name} is a mask method, which has no export\n"
            "quantise a network with a classifier"
        )


class Work:
    """A checkpoint, its data, its float32 graph and scores; quantises and scores any choice of layers."""

    def __init__(self, opened: Opened, request: Request, limits: Limits) -> None:
        self.opened, self.request, self.limits = opened, request, limits
        self.metadata = opened.metadata
        self.recipe: Recipe = recipe_of(request.checkpoint, self.metadata, request.data)
        require_channels(request.checkpoint, self.metadata, self.recipe)
        self.protocol = (
            self.recipe.test if request.data else parse_protocol(self.metadata["protocol"], f"{opened.path}: protocol")
        )
        train, self.val = (open_dataset(self.recipe, split, request.root) for split in ("train", "val"))
        for each in (train, self.val):
            require_data_classes(request.checkpoint, self.metadata["classes"], self.recipe.name, each.classes)
        self.count = min(len(self.val), request.limit or len(self.val))
        self.calibration, self.missing = self._choose(train)
        self.content = self._export()
        self.graph = Graph(self.content, self.metadata)
        if not self.graph.layers:
            raise CommandError(f"{opened.path}: has no layer that int8 kernels could compute\nnothing is written")
        self.inputs = self._calibrate(train)
        self.float = self.engine(self.content)
        self.before = self._count(self.float, "scored float32")
        require_labels(self.before.matrix, f"val split of recipe {self.recipe.name} ({self.count} images)")
        self.expected = [self._logits(self.float, pixels) for pixels in self.inputs]
        self.costs: list[Cost] = []

    # ---- preparing -----------------------------------------------------------------------------------------------

    def _choose(self, train: Dataset) -> tuple[list[int], list[str]]:
        """Calibration images, and classes that none of them has, which are warned of."""
        wanted = self.request.images
        if wanted > len(train):
            echo(f"--images {wanted}: the training split has {len(train)}; all are used", err=True)
        with progress_bar(min(len(train), LOOKED_AT), "read labels of") as advance:
            chosen = choose_images(train, wanted, advance)
        if chosen.missing:
            names = printable(", ".join(chosen.missing[:8])) + (" and more" if len(chosen.missing) > 8 else "")
            echo(
                f"warning: no calibration image has {len(chosen.missing)} of {len(train.classes)} classes: {names}\n"
                "ranges may be too small for them: give more --images",
                err=True,
            )
        return chosen.indices, chosen.missing

    def _export(self) -> bytes:
        """The float32 graph; from the cache of exports, unless an opset is requested."""
        model, path = self.opened.model, self.opened.path
        assert model is not None
        if self.request.opset is None:
            return read_file(cached_export(path, model, self.metadata, "onnxruntime"), 2**31)
        echo(f"exporting {path}; this takes up to a few minutes", err=True)
        form = Form(opset=self.request.opset)
        return make_export(path, self.request.out, model, self.metadata, form, lambda line: None).content

    def _calibrate(self, train: Dataset) -> list[np.ndarray]:
        """Measures ranges on the calibration images; returns one input of each of the first SEARCHED of them."""
        kept: list[np.ndarray] = []

        def every() -> Any:
            with progress_bar(len(self.calibration), "calibrated on") as advance:
                for windows in network_inputs(train, self.calibration, self.protocol, self.metadata):
                    if len(kept) < SEARCHED:
                        kept.append(windows[0])
                    yield from windows
                    advance(1)

        self.graph.measure_ranges(every(), self.request.method)
        return kept

    def engine(self, content: bytes, runtime: str = REFERENCE) -> GraphEngine:
        """Runs the content of an ONNX file."""
        channels, classes = len(self.metadata["mean"]), len(self.metadata["classes"])
        graph = Runnable(content, "normalized", channels, None, None, (1, 1), classes)
        return graph_engine(self.request.out, graph, runtime, classes, "float32", CPU)

    # ---- scoring -------------------------------------------------------------------------------------------------

    def _count(self, engine: GraphEngine, verb: str) -> Confusion:
        with progress_bar(self.count, verb) as advance:
            return evaluate_model(
                engine,
                self.val,
                self.protocol.model_dump(),
                self.metadata["mean"],
                self.metadata["std"],
                CPU,
                workers=WORKERS,
                limit=self.count,
                progress=advance,
            )

    @staticmethod
    def _logits(engine: GraphEngine, pixels: np.ndarray) -> np.ndarray:
        return engine.logits(torch.from_numpy(pixels)).final.numpy()

    def full(self) -> Made:
        """The network with all layers in int8."""
        return self.quantise([])

    def quantise(self, floats: Sequence[str]) -> Made:
        """The network with all layers but `floats` in int8."""
        content = self.graph.quantized(set(self.graph.layers) - set(floats))
        scores = self._count(self.engine(content), f"scored int8, {len(floats)} layers in float32,")
        return Made(content, list(floats), judge(self.before, scores, self.metadata["classes"], self.limits))

    def error(self, layers: Collection[str]) -> float:
        """Mean squared error of the logits, relative to their variance, with only these layers in int8."""
        engine = self.engine(self.graph.quantized(layers))
        total = sum(
            float(np.square(self._logits(engine, pixels) - before).mean() / max(before.var(), 1e-12))
            for pixels, before in zip(self.inputs, self.expected, strict=True)
        )
        return total / len(self.inputs)

    def search(self) -> Made | None:
        """The network with the fewest of the most costly layers in float32 that is within the limits; or None."""
        started, seconds = time.perf_counter(), 60 * self.request.minutes
        self.costs = rank_layers(self.graph.layers, self.error, RANKING * seconds)

        def attempt(floats: list[str]) -> Made | None:
            if len(floats) == len(self.graph.layers):
                return None
            made = self.quantise(floats)
            change, excess = made.verdict.change, made.verdict.excess
            result = "within the limits" if not excess else f"too much: {excess}"
            echo(f"  {len(floats)} layers in float32: mIoU {change:+.2f} points, {result}", err=True)
            return made if made.verdict.passes else None

        return fewest(self.costs, attempt, started + seconds)

    def refusal(self, made: Made) -> str:
        """The error if no choice of layers is within the limits."""
        worst = ", ".join(f"{cost.layers[0]} ({cost.error:.1e})" for cost in self.costs[:3])
        return (
            f"{self.request.out}: not written: with all layers in int8 {made.verdict.excess}, and still too much with "
            "the most costly in float32\n"
            f"most costly layers (relative error of the logits): {worst}\n"
            "try another --method, more --images or --minutes, or allow more with --max-drop and --max-class-drop"
        )

    # ---- reporting -----------------------------------------------------------------------------------------------

    def measure_speed(self, made: Made) -> Speed:
        """Both networks in each runtime that is installed, on an image as the protocol makes it."""
        runtimes = [REFERENCE] + (["openvino"] if find_spec("openvino") else [])
        engines = {each: (self.engine(self.content, each), self.engine(made.content, each)) for each in runtimes}
        return measure_speed(engines, torch.from_numpy(self.inputs[0]), torch.get_num_threads(), TIMED)

    def report(self, made: Made, speed: Speed) -> dict[str, Any]:
        """What `--json` writes."""
        return {
            "checkpoint": str(self.opened.path),
            "out": str(self.request.out),
            "recipe": self.recipe.name,
            "images": self.count,
            "statement": state_protocol(self.protocol, "val", self.count, len(self.val)),
            "calibration": {
                "method": self.request.method,
                "images": len(self.calibration),
                "missing_classes": self.missing,
            },
            "layers": len(self.graph.layers),
            "float_layers": made.floats,
            "costs": [cost._asdict() for cost in self.costs],
            "MiB_before": len(self.content) / 2**20,
            "MiB_after": len(made.content) / 2**20,
            **as_json(made.verdict, speed),
        }
