"""`ssaseg convert` to .onnx and .pt2: a network for other programs, written once it is verified.

The file describes itself: its header has what the checkpoint says of classes and preprocessing, and what the graph
takes and gives. In ONNX it is the model's metadata, JSON values by key; in a .pt2 the extra file `ssaseg.json`.
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

import click
import cv2
import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from ssaseg.cli.errors import CommandError
from ssaseg.datasets.colour import normalize, to_planes
from ssaseg.datasets.decoding import read_image
from ssaseg.datasets.pairs import IMAGE_SUFFIXES
from ssaseg.datasets.synthetic import SyntheticScenes
from ssaseg.datasets.transforms import test_image
from ssaseg.models import Segmenter
from ssaseg.models.checkpoint import write_atomic
from ssaseg.models.deploy import Deployed, Normalize, PoolByProducts, at_input_size, fold, sides, smallest, trace

FORMAT = "ssaseg-deploy-1"

HEADER = "ssaseg.json"  # a .pt2's extra file

OPSET = 18  # of ONNX: the oldest that PyTorch writes as it is, for old runtimes

NEEDED = ("onnx", "onnxscript", "onnxruntime")

# Height and width that a graph of any size is traced with [pixels]. Networks leave out a resizing to the size that is
# there; here none meets its own, so that the graph has them all. Where one does later, it changes nothing.
EXAMPLE = (160, 224)

TOLERANCE = 1e-4  # of logits, relative to the largest where that is above 1

DIFFERING = 1e-3  # share of pixels that may have another label, of classes as close as TOLERANCE

VERIFIED = 8  # of the user's images, at most

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """What is exported: `output` of `ssaseg.models.deploy.OUTPUTS`; `input` normalized (float32) or rgb (uint8).

    `size`: the only (height, width) that the graph takes, None for any. `verify`: an image or a folder of images.
    """

    output: str = "logits"
    input: str = "normalized"
    size: tuple[int, int] | None = None
    verify: str | None = None


class Case(NamedTuple):
    """Images to verify on, as the graph takes them (N,3,H,W)."""

    name: str
    images: Tensor


class Difference(NamedTuple):
    """How far a graph is from PyTorch on one case."""

    apart: float  # logits: largest difference; labels: by how much the chosen class is below the best
    allowed: float
    share: float | None = None  # of pixels with another label

    @property
    def passes(self) -> bool:
        """False for what is not a number, too."""
        return self.apart <= self.allowed and (self.share or 0.0) <= DIFFERING

    def __str__(self) -> str:
        logits = f"{self.apart:.1e} (allowed {self.allowed:.1e})"
        if self.share is None:
            return logits
        return f"in {100 * self.share:.3f} % of labels (allowed {100 * DIFFERING:g} %), there by logits of {logits}"


def write_export(source: Path, destination: Path, model: Segmenter, metadata: Mapping[str, Any], form: Form) -> int:
    """Writes `model` as .onnx or .pt2, by `destination`'s suffix, and prints how far that is from PyTorch.

    `source`: the checkpoint that it is from, for messages. Returns 0. Raises CommandError, having written nothing: with
    exit code 3 where the graph differs by more than TOLERANCE or does not run, with 2 where there is none, the extra
    packages are missing or `destination` can't be written.
    """
    kind = destination.suffix.lower()
    missing = [name for name in NEEDED if kind == ".onnx" and find_spec(name) is None]
    if missing:
        raise CommandError(f"{destination}: needs {', '.join(missing)}, not installed\npip install {' '.join(missing)}")
    destination.parent.mkdir(parents=True, exist_ok=True)  # fails now, rather than after minutes
    if not os.access(destination.parent, os.W_OK | os.X_OK):
        raise CommandError(f"{destination}: its folder cannot be written\ngive a file in a folder that can")
    pictures = _own_images(form.verify, metadata["protocol"])
    plain, lean = (_deployed(source, each, metadata, form) for each in (model, fold(model)))
    any_size = "any size" if form.size is None else "{} x {} pixels".format(*form.size)
    click.echo(f"{source}: {model.name}, {model.classifier_name}, {model.num_classes} classes; {any_size}")
    with PoolByProducts() if kind == ".onnx" else nullcontext():
        program = _program(source, lean, form)
    header = {key: metadata[key] for key in ("model", "classifier", "classes", "palette", "mean", "std", "protocol")}
    header |= {"format": FORMAT, "input": form.input, "output": form.output}
    header |= {"size": form.size, "smallest": smallest(program)}
    with _quiet():
        content = onnx_bytes(program, header) if kind == ".onnx" else pt2_bytes(program, header)
        run = onnx_runner(content) if kind == ".onnx" else pt2_runner(content)
    _verify(destination, plain, run, cases(form, metadata, pictures, smallest(program)))
    write_atomic(destination, content)
    least = "" if form.size else ", from {} x {} pixels on".format(*smallest(program))
    click.echo(f"wrote {destination}: {len(content) / 2**20:.1f} MiB, {form.input} to {form.output}, any batch{least}")
    return 0


def _deployed(source: Path, model: Segmenter, metadata: Mapping[str, Any], form: Form) -> Deployed:
    prepare = Normalize(metadata["mean"], metadata["std"]) if form.input == "rgb" else None
    try:
        return Deployed(model, form.output, prepare).eval()
    except ValueError as error:
        raise CommandError(f"{source}: {error}") from None


def _program(source: Path, network: Deployed, form: Form) -> ExportedProgram:
    images = torch.zeros(2, 3, *(form.size or EXAMPLE), dtype=torch.uint8 if form.input == "rgb" else torch.float32)
    try:
        with _quiet():
            return trace(network, images, form.size is None)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        mend = "try --size H W, a graph for one size" if form.size is None else "another version of PyTorch may do it"
        raise CommandError(f"{source}: PyTorch makes no graph of it: {reason}\n{mend}", 3) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters have to say about themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


# ---- the two kinds of file ---------------------------------------------------------------------------------------
def pt2_bytes(program: ExportedProgram, header: Mapping[str, Any]) -> bytes:
    """A .pt2 file, for `torch.export.load`."""
    buffer = BytesIO()
    torch.export.save(program, buffer, extra_files={HEADER: json.dumps(header)})
    return buffer.getvalue()


def pt2_runner(content: bytes) -> Run:
    """What a .pt2 file computes."""
    return torch.export.load(BytesIO(content)).module()


def onnx_bytes(program: ExportedProgram, header: Mapping[str, Any]) -> bytes:
    """An ONNX file with input `images` and one output, named after what it is."""
    made = torch.onnx.export(
        program,
        (),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=[header["output"]],
        external_data=False,
        verbose=False,
    )
    assert made is not None
    proto = made.model_proto
    names = {str(side): name for side, name in zip(sides(program), ("height", "width"), strict=True)}
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\bs\d+\b", lambda symbol: names.get(symbol[0], "batch"), dim.dim_param)
    for node in proto.graph.node:
        del node.metadata_props[:]  # where in the exporter's and our code it comes from
    for key, value in header.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    return proto.SerializeToString()


def onnx_runner(content: bytes) -> Run:
    """What an ONNX file computes, by ONNX Runtime on the CPU."""
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised, too
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


# ---- verifying ---------------------------------------------------------------------------------------------------
def _own_images(verify: str | None, protocol: Mapping[str, Any]) -> list[tuple[str, np.ndarray]]:
    """Names and images, BGR uint8 (H,W,3), of `--verify`, resized as the checkpoint's protocol says."""
    if verify is None:
        return []
    path = Path(verify)
    inside = sorted(each for each in path.rglob("*") if each.suffix.lower() in IMAGE_SUFFIXES)
    files = [path] if path.is_file() else inside[:VERIFIED]
    if not files:
        raise CommandError(f"--verify {verify}: no image found\nexpected an image, or a folder of images")
    return [(each.name, test_image(read_image(each), protocol["scale"], protocol["multiple"])) for each in files]


def cases(
    form: Form, metadata: Mapping[str, Any], pictures: Sequence[tuple[str, np.ndarray]], least: tuple[int, int]
) -> Iterator[Case]:
    """Random images of three batches and sizes, the smallest among them; two built-in scenes; the user's images."""
    seeded = torch.Generator().manual_seed(0)
    for batch, size in ((1, least), (2, (96, 160)), (3, (131, 97))):
        shape = (batch, 3, *(form.size or map(max, size, least)))
        if form.input == "rgb":
            images = torch.randint(0, 256, shape, generator=seeded, dtype=torch.uint8)
        else:
            images = torch.randn(shape, generator=seeded)
        yield Case("random", images)
    scenes = SyntheticScenes(2, height=192, width=256, split="val")
    for name, picture in [(f"scene {scenes.name(i)}", scenes.load_image(i)) for i in range(2)] + [*pictures]:
        height, width = form.size or map(max, picture.shape[:2], least)
        # A picture that fits is left as it is, to the bit.
        image = torch.from_numpy(cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR))[None]
        pixels = to_planes(image).byte() if form.input == "rgb" else normalize(image, metadata["mean"], metadata["std"])
        yield Case(name, pixels)


def _verify(destination: Path, plain: Deployed, run: Run, tried: Iterator[Case]) -> None:
    """Compares and prints case by case; raises CommandError with exit code 3 at the first that fails."""
    for name, images in tried:
        title = "{} {}x3x{}x{}".format(name, *(images.shape[axis] for axis in (0, 2, 3)))
        try:
            got = run(images)
        except Exception as error:  # each runtime has types of its own
            reason = str(error).strip().partition("\n")[0]
            raise CommandError(f"{destination}: not written, as it does not run on {title}\n{reason}", 3) from error
        difference = compare(plain, images, got)
        click.echo(f"  {title:32} apart {difference}")
        if not difference.passes:
            raise CommandError(
                f"{destination}: not written, as it is not what PyTorch computes on {title}\n"
                f"apart {difference}\nother versions of torch or onnxruntime may agree",
                3,
            )


@torch.no_grad()
def compare(plain: Deployed, images: Tensor, got: Tensor) -> Difference:
    """What a graph gave for images (N,3,H,W), against the network as it was trained, with nothing folded."""
    logits = plain.model(plain.prepare(images))
    if got.dtype != torch.uint8:
        expected = plain.finish(logits, images.shape[-2:])
        apart = (got - expected).abs().max().item() if got.shape == expected.shape else float("nan")
        return Difference(apart, TOLERANCE * max(1.0, expected.abs().max().item()))
    full = at_input_size(logits, images.shape[-2:])
    allowed = TOLERANCE * max(1.0, full.abs().max().item())
    best, labels = full.max(dim=1)
    if got.shape != labels.shape or got.max() >= full.shape[1]:
        return Difference(float("nan"), allowed)
    below = best - full.gather(1, got.long().unsqueeze(1)).squeeze(1)
    return Difference(below.max().item(), allowed, (got != labels).float().mean().item())
