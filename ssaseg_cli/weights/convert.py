"""`ssaseg convert`: opens the source, changes its classes if requested, writes it by the suffix of the destination.

`opening` opens official weights, `classes` moves rows of classes by their names.

An ImageNet checkpoint has no classifier, so the result is not a model that can predict. The file then holds only the
backbone's tensors, under our keys, with the format "ssaseg-backbone-1" in its header. It is for `model.pretrained` of
a recipe; `load_model` refuses it with an error that names the format.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.weights.classes import follow_names, ignores_zero, requested_classes
from ssaseg.cli.weights.deploy import write_deploy
from ssaseg.cli.weights.export import SUFFIXES, Form, write_export
from ssaseg.cli.weights.foreign import read_weights
from ssaseg.cli.weights.huggingface import weights_file, write_folder
from ssaseg.cli.weights.opening import Given, Loaded, fresh, open_official
from ssaseg.files.writing import write_atomic
from ssaseg.models import Segmenter, load_model, save_model
from ssaseg.models.checkpoint import write_tensors
from ssaseg.models.header import CheckpointError
from ssaseg.models.masks.base import MASKS
from ssaseg.models.official import aliases, left_out, official_entries

BACKBONE_FORMAT = "ssaseg-backbone-1"


@dataclass(frozen=True)
class Request:
    """The arguments of the command; `form` has those fields of `Form` that were given."""

    source: Path
    destination: Path
    model: str | None = None
    classifier: str | None = None
    dataset: str | None = None
    classes: str | None = None
    allow_partial: bool = False
    deploy: bool = False
    form: Mapping[str, Any] = field(default_factory=dict)

    @property
    def given(self) -> Given:
        """What it says about official weights."""
        return Given(self.model, self.classifier, self.dataset, self.allow_partial)

    def options(self) -> list[str]:
        """The given options that belong only to some writers."""
        own = {"--dataset": self.dataset, "--classes": self.classes, "--allow-partial": self.allow_partial or None}
        return [name for name, value in own.items() if value is not None] + [f"--{name}" for name in self.form]


class Writer(NamedTuple):
    """One kind of destination."""

    write: Callable[[Request, Loaded], int]
    ours: bool  # accepts only a whole checkpoint of ours
    options: frozenset[str]  # those that it accepts
    fix: str  # the last line of the error for other options


def run_convert(
    source: Path,
    destination: Path,
    model: str | None = None,
    classifier: str | None = None,
    dataset: str | None = None,
    classes: str | None = None,
    allow_partial: bool = False,
    deploy: bool = False,
    form: Mapping[str, Any] | None = None,
) -> int:
    """Converts weights. The suffix of `destination` decides the format: .safetensors ours, .pth official names, .onnx,
    .pt2 and .xml exports, for which `form` has those fields of `Form` that were given; without a suffix, and for a
    folder that exists, a folder of transformers.

    `model`, `classifier`: None reads them from the file. `dataset`: a published data set or a recipe that names the
    classes of official weights. `classes`: the new classes of a .safetensors file, see `requested_classes`; the rows of
    the classifier are moved to the classes with the same name. `deploy`: a small .safetensors, see `deploy`. Returns 0,
    or 1 if only a part of the weights matched, or no class name did. Raises CommandError, before anything is written,
    if an option does not belong to the destination, or if tensors do not match and `allow_partial` is not set.
    """
    request = Request(source, destination, model, classifier, dataset, classes, allow_partial, deploy, form or {})
    writer = find_writer(request)
    opened = open_ours(request) if writer.ours else open_any(request)
    opened, known = change_classes(request, opened)
    code = writer.write(request, opened)
    if not opened.complete:
        echo("warning: only a part matched; tensors that did not match have new weights", err=True)
    return code or int(not (opened.complete and known))


def find_writer(request: Request) -> Writer:
    """The writer of the destination. Raises CommandError for an unknown suffix, and for options of other writers."""
    destination, source = request.destination, request.source
    suffix = FOLDER if destination.is_dir() else destination.suffix.lower()
    if suffix not in WRITERS:
        raise CommandError(
            f"{destination}: cannot convert to {destination.suffix}\n"
            "expected .safetensors (ssaseg's format), .pth (official names), .onnx, .pt2, .xml (OpenVINO) or a folder\n"
            "(transformers): a name without a suffix, or an empty folder that exists"
        )
    if suffix == FOLDER and destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise CommandError(
            f"{destination}: {'a folder that is not empty' if destination.is_dir() else 'a file without a suffix'}\n"
            "expected a new or an empty folder, as nothing may be overwritten there\ngive another DESTINATION"
        )
    taken = weights_file(source) if source.is_dir() and suffix != FOLDER else source
    if destination.exists() and destination.samefile(taken):
        raise CommandError(f"{destination}: source and destination are the same file\ngive the result another name")
    if request.deploy and suffix != ".safetensors":
        raise CommandError(
            f"--deploy: only for .safetensors, not {destination}\n"
            "leave it out: exported files never have training-only weights"
        )
    writer = DEPLOY if request.deploy else WRITERS[suffix]
    wrong = next((option for option in request.options() if option not in writer.options), None)
    if wrong is not None and request.deploy:
        raise CommandError(f"{wrong}: not with --deploy, which needs a whole checkpoint of ssaseg\n{writer.fix}")
    if wrong is not None:
        suffixes = [suffix for suffix, each in WRITERS.items() if wrong in each.options]
        what = "official weights to .safetensors" if wrong in OFFICIAL_ONLY else " and ".join(suffixes)
        raise CommandError(f"{wrong}: only for {what}, not {destination}\n{writer.fix}")
    return writer


# ---- opening -------------------------------------------------------------------------------------------------------


def open_ours(request: Request) -> Loaded:
    """A checkpoint of ours. Raises CommandError if an option contradicts it, or for a deploy form, except to export."""
    source = request.source
    try:
        if source.is_dir():
            raise CheckpointError(f"{source}: a folder")
        network, metadata = load_model(source)
    except CheckpointError:
        if source.suffix.lower() == ".safetensors" and not source.is_dir():
            raise
        raise CommandError(
            f"{source}: is not a checkpoint of ssaseg\nconvert it first: ssaseg convert {source} OURS.safetensors"
        ) from None
    if "deploy" in metadata and request.destination.suffix.lower() not in SUFFIXES:
        raise CommandError(
            f"{source}: is a deploy form, without the weights that only training needs\n"
            "convert the checkpoint that it was made from; a deploy form can only be exported: .onnx, .pt2, .xml"
        )
    for option, given, own in (
        ("--model", request.model, network.name),
        ("--classifier", request.classifier, network.classifier_name),
    ):
        if given not in (None, own):
            raise CommandError(f"{source}: its header says {own}, {option} says {given}\nleave {option} out")
    return Loaded(network.name, network, metadata, {})


def open_any(request: Request) -> Loaded:
    """Official weights, or a checkpoint of ours that gets new classes."""
    source, weights = request.source, read_weights(request.source)
    if weights.is_backbone and request.classes is not None:
        raise CommandError(
            f"{source}: holds only a backbone, so it has no classes that --classes could keep\nleave out --classes"
        )
    if weights.header is None:
        return open_official(source, weights, request.given)
    if request.classes is None:
        raise CommandError(
            f"{source}: is already a file of ssaseg (format {weights.header['format']})\n"
            "for official names, give a DESTINATION that ends in .pth; for other classes, use --classes"
        )
    if request.dataset is not None:
        raise CommandError(
            f"{source}: its header names its classes; --dataset is only for official files\nleave out --dataset"
        )
    return open_ours(request)


# ---- new classes -----------------------------------------------------------------------------------------------------


def change_classes(request: Request, opened: Loaded) -> tuple[Loaded, bool]:
    """The network with the classes of `--classes`, if given, and whether it already had any of them."""
    if request.classes is None or opened.network is None:
        return opened, True
    requested = requested_classes(request.classes)
    require_classifier(request.source, opened, "--classes")
    if "classes" not in opened.metadata:
        raise CommandError(
            f"{request.source}: its classes have no names, so --classes can keep none\ngive their names with --dataset"
        )
    network = opened.network
    other = fresh(opened.name, len(requested["classes"]), network.classifier_name, network.options, network.channels)
    metadata, known = follow_names(opened.network, opened.metadata, requested, other)
    return opened._replace(network=other, metadata=metadata), known


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_ours(request: Request, opened: Loaded) -> int:
    """Writes a checkpoint of ours, or only a backbone, see the module's docstring."""
    if opened.network is not None:
        save_model(request.destination, opened.network, opened.metadata)
        echo(f"wrote {request.destination}")
        return 0
    write_tensors(request.destination, opened.backbone, {"format": BACKBONE_FORMAT, "model": opened.name})
    echo(f"wrote {request.destination}: weights to start from, for a recipe's model.pretrained")
    return 0


def write_official(request: Request, opened: Loaded) -> int:
    """Writes one of our checkpoints with official names, as mmsegmentation 0.x reads them."""
    network, metadata = whole(opened), opened.metadata
    if not network.classifier.OFFICIAL_FILES:
        raise CommandError(
            f"{request.destination}: no other program reads a {network.name} with {network.classifier_name}\n"
            "expected .safetensors, .onnx, .pt2 or .xml"
        )
    state, official = network.state_dict(), {}
    for entry in official_entries(network):
        official.update(entry.give(state))
    for key, others in aliases(network, list(official)).items():
        official.update(dict.fromkeys(others, official[key]))
    meta = {"CLASSES": metadata["classes"], "PALETTE": metadata["palette"]}
    buffer = BytesIO()
    torch.save({"state_dict": official, "meta": meta}, buffer)
    write_atomic(request.destination, buffer.getvalue())
    echo(f"wrote {request.destination}: {len(official)} tensors of {network.name}, {network.classifier_name}")
    missing = left_out(network)
    echo(f"left out, official keys that models of ssaseg do not have: {len(missing) or 'none'}")
    for key, reason in missing.items():
        echo(f"  {key} ({reason})")
    return 0


def write_transformers(request: Request, opened: Loaded) -> int:
    """Writes one of our checkpoints as a folder of transformers."""
    network, metadata = whole(opened), opened.metadata
    lost = write_folder(request.destination, network, metadata, ignores_zero(metadata))
    echo(f"wrote {request.destination}: {network.name} for transformers, {network.num_classes} classes")
    for line in lost:
        echo(line)
    return 0


def write_small(request: Request, opened: Loaded) -> int:
    """Writes the deploy form of one of our checkpoints."""
    return write_deploy(request.source, request.destination, whole(opened), opened.metadata)


def write_graph(request: Request, opened: Loaded) -> int:
    """Writes .onnx, .pt2 or .xml."""
    require_classifier(request.source, opened, request.destination.suffix)
    return write_export(request.source, request.destination, whole(opened), opened.metadata, Form(**request.form))


def require_classifier(source: Path, opened: Loaded, what: str) -> None:
    """Raises CommandError for a mask method: `what`, an option or a suffix, needs a network with a classifier."""
    if whole(opened).classifier_name == MASKS:
        raise CommandError(f"{source}: {opened.name} is a mask method; {what} is only for networks with a classifier")


def whole(opened: Loaded) -> Segmenter:
    """The network of a source that was opened as a checkpoint of ours."""
    assert opened.network is not None
    return opened.network


FOLDER = ""  # stands for a suffix
OFFICIAL_ONLY = ("--dataset", "--allow-partial")
WRITERS = {
    ".safetensors": Writer(write_ours, False, frozenset({"--dataset", "--classes", "--allow-partial"}), "leave it out"),
    ".pth": Writer(write_official, True, frozenset(), "leave it out, or convert to .safetensors first"),
    FOLDER: Writer(write_transformers, True, frozenset(), "leave it out, or convert to .safetensors first"),
    **dict.fromkeys(
        SUFFIXES,
        Writer(
            write_graph,
            True,
            frozenset({"--output", "--input", "--size", "--verify"}),
            "leave it out, or convert to .safetensors first",
        ),
    ),
}
DEPLOY = Writer(write_small, True, frozenset(), "convert without --deploy first, then convert the result with --deploy")
