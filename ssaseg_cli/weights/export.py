"""`ssaseg convert` to .onnx, .pt2 and .xml: a network for other programs. It is verified before it is written.

The file describes itself: its header has the checkpoint's classes, preprocessing and recipe, and the input and output
of the graph. In ONNX the header is the model's metadata, JSON values by key; in a .pt2 it is the extra file
`ssaseg.json`; for OpenVINO see `openvino_files`.
"""

import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.weights.openvino_files import compile_graph, from_onnx, read_graph, runner
from ssaseg.datasets.bands.reading import read_bands
from ssaseg.datasets.colour import normalize, to_planes
from ssaseg.datasets.pairs import IMAGE_SUFFIXES
from ssaseg.datasets.synthetic import SyntheticScenes
from ssaseg.datasets.transforms import resize, test_image
from ssaseg.files.writing import write_atomic
from ssaseg.models import Segmenter
from ssaseg.models.deploy import Deployed, Normalize, PoolByProducts, at_input_size, fold, sides, smallest, trace

FORMAT = "ssaseg-deploy-1"

HEADER = "ssaseg.json"  # a .pt2's extra file

OPSET = 18  # of ONNX: the oldest that PyTorch writes without converting, for old runtimes

SUFFIXES = (".onnx", ".pt2", ".xml")

# Packages that write and verify each kind of file.
NEEDED = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".pt2": (), ".xml": ("onnx", "onnxscript", "openvino")}

# Height and width that a graph for any size is traced with [pixels]. A network skips a resize if the size is already
# right. With this size no resize is skipped, so the graph has all of them. One that is not needed later has no effect.
# And no map has one window of 7×7 alone in a row or column, as PyTorch takes a length of 1 for a fixed one.
EXAMPLE = (291, 483)

TOLERANCE = 1e-4  # of logits, relative to the largest if that is above 1

DIFFERING = 1e-3  # share of pixels that may have another label, if the classes' logits differ by at most TOLERANCE

VERIFIED = 8  # of the user's images, at most

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """What is exported: `output` is one of `ssaseg.models.deploy.OUTPUTS`; `input` is normalized (float32) or rgb
    (uint8).

    `size`: the only (height, width) that the graph accepts; None: any. `verify`: an image or a folder of images.
    `opset`: version of ONNX's operators.
    """

    output: str = "logits"
    input: str = "normalized"
    size: tuple[int, int] | None = None
    verify: str | None = None
    opset: int = OPSET


class Case(NamedTuple):
    """Images to verify on, in the form of the graph's input (N,3,H,W); where images have other channels, not 3."""

    name: str
    images: Tensor


class Difference(NamedTuple):
    """The difference between a graph's output and PyTorch's on one case."""

    largest: float  # of the logits; for labels: by how much the logit of the chosen class is below the best
    allowed: float
    share: float | None = None  # of pixels with another label

    @property
    def passes(self) -> bool:
        """Whether the difference is allowed. False if it is not a number."""
        return self.largest <= self.allowed and (self.share or 0.0) <= DIFFERING

    def __str__(self) -> str:
        logits = f"largest difference {self.largest:.1e} (allowed {self.allowed:.1e})"
        if self.share is None:
            return logits
        return f"{100 * self.share:.3f} % of the labels differ (allowed {100 * DIFFERING:g} %); their logits: {logits}"


class Made(NamedTuple):
    """A verified export: the content of its file, of an .xml also of the .bin beside it; and the smallest size."""

    content: bytes
    weights: bytes | None
    least: tuple[int, int]  # height and width [pixels]


def write_export(source: Path, destination: Path, model: Segmenter, metadata: Mapping[str, Any], form: Form) -> int:
    """Writes `model` as .onnx, .pt2 or .xml, by the suffix of `destination`, and prints how it differs from PyTorch.

    `source`: the checkpoint that it is from, for messages. Returns 0. Raises CommandError, before anything is written:
    with exit code 3 if PyTorch cannot trace the graph, or if the graph does not run or differs by more than TOLERANCE;
    with 2 if packages are missing, or if `destination` cannot be written.
    """
    require_packages(destination, NEEDED[destination.suffix.lower()])
    destination.parent.mkdir(parents=True, exist_ok=True)  # fails now, rather than after minutes
    if not os.access(destination.parent, os.W_OK | os.X_OK):
        raise CommandError(f"{destination}: its folder cannot be written\ngive a file in a folder that can")
    made = make_export(source, destination, model, metadata, form)
    size = len(made.content)
    if made.weights is not None:
        write_atomic(destination.with_suffix(".bin"), made.weights)
        size += len(made.weights)
    write_atomic(destination, made.content)
    least = "" if form.size else ", images of at least {} x {} pixels".format(*made.least)
    written = str(destination) if made.weights is None else f"{destination} and its .bin"
    echo(f"wrote {written}: {size / 2**20:.1f} MiB, {form.input} to {form.output}, any batch size{least}")
    return 0


def require_packages(file: Path, names: Sequence[str]) -> None:
    """Raises CommandError, which says how to install them, if packages that `file` needs are missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise CommandError(f"{file}: needs {', '.join(missing)}, not installed\npip install {' '.join(missing)}")


def make_export(
    source: Path,
    destination: Path,
    model: Segmenter,
    metadata: Mapping[str, Any],
    form: Form,
    report: Callable[[str], object] = echo,
) -> Made:
    """The export of `model` for a file with the suffix of `destination`, verified, not written. `report` gets the
    lines for the user. Raises what `write_export` raises.
    """
    kind = destination.suffix.lower()
    pictures = _user_images(form.verify, metadata, model.channels)
    plain, folded = (_deployed(source, each, metadata, form) for each in (model, fold(model)))
    any_size = "any size" if form.size is None else "{} x {} pixels".format(*form.size)
    report(f"{source}: {model.name}, {model.classifier_name}, {model.num_classes} classes; {any_size}")
    with nullcontext() if kind == ".pt2" else PoolByProducts():
        program = _program(source, folded, form)
    least = smallest(program)
    header = {key: metadata[key] for key in ("model", "classifier", "classes", "palette", "mean", "std", "protocol")}
    header |= {"range": metadata.get("range")} | ({} if model.channels == 3 else {"channels": model.channels})
    header |= {"step": metadata.get("step", 0), "recipe": metadata.get("recipe")}
    header |= {key: metadata[key] for key in ("untrained",) if key in metadata}
    header |= {"format": FORMAT, "input": form.input, "output": form.output, "size": form.size, "smallest": least}
    weights, run = None, None
    with _quiet():
        content = pt2_bytes(program, header) if kind == ".pt2" else onnx_bytes(program, header, form.opset)
        if kind == ".xml":
            content, weights = from_onnx(content, header)
            run = runner(compile_graph(read_graph(content, weights)))
        else:
            run = onnx_runner(content) if kind == ".onnx" else pt2_runner(content)
    _verify(destination, plain, run, cases(form, metadata, pictures, least), report)
    return Made(content, weights, least)


def _deployed(source: Path, model: Segmenter, metadata: Mapping[str, Any], form: Form) -> Deployed:
    prepare = Normalize(metadata["mean"], metadata["std"]) if form.input == "rgb" else None
    try:
        return Deployed(model, form.output, prepare).eval()
    except ValueError as error:
        raise CommandError(f"{source}: {error}") from None


def _program(source: Path, network: Deployed, form: Form) -> ExportedProgram:
    kind, channels = torch.uint8 if form.input == "rgb" else torch.float32, network.model.channels
    images = torch.zeros(2, channels, *(form.size or EXAMPLE), dtype=kind)
    try:
        with _quiet():
            return trace(network, images, form.size is None)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        fix = "try --size H W, a graph for one size" if form.size is None else "try another version of PyTorch"
        raise CommandError(f"{source}: PyTorch cannot trace its graph: {reason}\n{fix}", 3) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside this context the exporters print no warnings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # errors are also raised
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# ---- the two kinds of file ---------------------------------------------------------------------------------------
def pt2_bytes(program: ExportedProgram, header: Mapping[str, Any]) -> bytes:
    """A .pt2 file, for `torch.export.load`."""
    buffer = BytesIO()
    torch.export.save(program, buffer, extra_files={HEADER: json.dumps(header)})
    return buffer.getvalue()


def pt2_runner(content: bytes) -> Run:
    """A function that computes what a .pt2 file computes."""
    return torch.export.load(BytesIO(content)).module()


def onnx_bytes(program: ExportedProgram, header: Mapping[str, Any], opset: int = OPSET) -> bytes:
    """An ONNX file with the input `images` and one output, whose name is the kind of output.

    Raises CommandError, with exit code 3, if PyTorch cannot write it with these operators.
    """
    made = torch.onnx.export(
        program,
        (),
        dynamo=True,
        opset_version=opset,
        input_names=["images"],
        output_names=[header["output"]],
        external_data=False,
        verbose=False,
    )
    assert made is not None
    proto = made.model_proto
    written = {each.domain: each.version for each in proto.opset_import}[""]
    if written != opset:  # PyTorch only warns if it cannot convert
        raise CommandError(
            f"--opset {opset}: not all operators can be converted to it, PyTorch wrote {written}\nleave it out", 3
        )
    names = {str(side): name for side, name in zip(sides(program), ("height", "width"), strict=True)}
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\bs\d+\b", lambda symbol: names.get(symbol[0], "batch"), dim.dim_param)
    for node in proto.graph.node:
        del node.metadata_props[:]  # from which lines of code the node comes
    for key, value in header.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    return proto.SerializeToString()


def onnx_runner(content: bytes) -> Run:
    """A function that computes what an ONNX file computes, with ONNX Runtime on the CPU."""
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # do not print errors: they are also raised
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


# ---- verifying ---------------------------------------------------------------------------------------------------
def _user_images(verify: str | None, metadata: Mapping[str, Any], channels: int) -> list[tuple[str, np.ndarray]]:
    """Names and images, BGR uint8 (H,W,channels), of `--verify`, resized by the checkpoint's protocol."""
    if verify is None:
        return []
    path = Path(verify)
    inside = sorted(each for each in path.rglob("*") if each.suffix.lower() in IMAGE_SUFFIXES)
    files = [path] if path.is_file() else inside[:VERIFIED]
    if not files:
        raise CommandError(f"--verify {verify}: no image found\nexpected an image, or a folder of images")
    protocol, levels = metadata["protocol"], metadata.get("range")
    images = ((each.name, read_bands(each, channels, levels=levels and tuple(levels))) for each in files)
    return [(name, test_image(image, protocol["scale"], protocol["multiple"])) for name, image in images]


def cases(
    form: Form, metadata: Mapping[str, Any], pictures: Sequence[tuple[str, np.ndarray]], least: tuple[int, int]
) -> Iterator[Case]:
    """Random images in three batch sizes and image sizes, one the smallest; two built-in scenes; the user's images."""
    seeded = torch.Generator().manual_seed(0)
    channels = len(metadata["mean"])
    for batch, size in ((1, least), (2, (96, 160)), (3, (131, 97))):
        shape = (batch, channels, *(form.size or map(max, size, least)))
        if form.input == "rgb":
            images = torch.randint(0, 256, shape, generator=seeded, dtype=torch.uint8)
        else:
            images = torch.randn(shape, generator=seeded)
        yield Case("random", images)
    scenes = SyntheticScenes(2, height=192, width=256, split="val")
    for name, picture in [(f"scene {scenes.name(i)}", _bands(scenes, i, channels)) for i in range(2)] + [*pictures]:
        height, width = form.size or map(max, picture.shape[:2], least)
        # A picture that fits stays exactly the same.
        image = torch.from_numpy(resize(picture, (width, height)))[None]
        pixels = to_planes(image).byte() if form.input == "rgb" else normalize(image, metadata["mean"], metadata["std"])
        yield Case(name, pixels)


def _bands(scenes: SyntheticScenes, index: int, channels: int) -> np.ndarray:
    """A scene BGR uint8 (H,W,channels): of more than three channels, the others are copies of these."""
    return np.ascontiguousarray(scenes.load_image(index)[..., [channel % 3 for channel in range(channels)]])


def _verify(
    destination: Path, plain: Deployed, run: Run, tried: Iterator[Case], report: Callable[[str], object]
) -> None:
    """Reports the difference of each case. Raises CommandError with exit code 3 for the first case that fails."""
    for name, images in tried:
        title = f"{name} {'x'.join(map(str, images.shape))}"
        try:
            got = run(images)
        except Exception as error:  # each runtime has its own types of errors
            reason = str(error).strip().partition("\n")[0]
            raise CommandError(
                f"{destination}: not written, because it does not run on {title}\n{reason}", 3
            ) from error
        found = difference(plain, images, got)
        report(f"  {title:32} {found}")
        if not found.passes:
            raise CommandError(
                f"{destination}: not written, because PyTorch computes another result on {title}\n"
                f"{found}\ntry another version of torch or onnxruntime",
                3,
            )


@torch.no_grad()
def difference(plain: Deployed, images: Tensor, got: Tensor) -> Difference:
    """The difference between `got`, a graph's output for images (N,3,H,W), and the trained network, nothing folded."""
    logits = plain.model(plain.prepare(images))
    if got.dtype != torch.uint8:
        expected = plain.finish(logits, images.shape[-2:])
        largest = (got - expected).abs().max().item() if got.shape == expected.shape else float("nan")
        return Difference(largest, TOLERANCE * max(1.0, expected.abs().max().item()))
    full = at_input_size(logits, images.shape[-2:])
    allowed = TOLERANCE * max(1.0, full.abs().max().item())
    best, labels = full.max(dim=1)
    if got.shape != labels.shape or got.max() >= full.shape[1]:
        return Difference(float("nan"), allowed)
    below = best - full.gather(1, got.long().unsqueeze(1)).squeeze(1)
    return Difference(below.max().item(), allowed, (got != labels).float().mean().item())
