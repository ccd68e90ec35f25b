"""`ssaseg convert`: open the source, give it other classes where wanted, write it by the destination's suffix.

What a file is and how it fits a network: `foreign`, `matching`; what its classes are called: `classes`.

What an ImageNet checkpoint becomes: it has no classifier, so it is not a model that could predict. The file holds the
backbone's tensors alone under our keys, with format "ssaseg-backbone-1" in its header. `model.pretrained` of a recipe
takes it; `load_model` refuses it, naming the format.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor

from ssaseg.cli.errors import CommandError
from ssaseg.cli.weights.classes import follow_names, own_classes, requested_classes
from ssaseg.cli.weights.deploy import write_deploy
from ssaseg.cli.weights.export import Form, write_export
from ssaseg.cli.weights.foreign import Weights, count_rows, read_weights, require_finite
from ssaseg.cli.weights.matching import Match, best_guess, describe_source, likely_model, match
from ssaseg.cli.weights.pretrained import PRETRAINED_SHARE
from ssaseg.models import Segmenter, build_model, list_models, load_model, save_model
from ssaseg.models.checkpoint import CheckpointError, write_atomic, write_tensors
from ssaseg.models.official import CLASSES_KEY, SSA_KEY, aliases, left_out, official_entries

BACKBONE_FORMAT = "ssaseg-backbone-1"


@dataclass(frozen=True)
class Request:
    """What the command was called with; `form` has what was given of `Form`'s fields."""

    source: Path
    destination: Path
    model: str | None = None
    classifier: str | None = None
    dataset: str | None = None
    classes: str | None = None
    allow_partial: bool = False
    deploy: bool = False
    form: Mapping[str, Any] = field(default_factory=dict)

    def options(self) -> list[str]:
        """The options that belong to some writers only, as far as they were given."""
        own = {"--dataset": self.dataset, "--classes": self.classes, "--allow-partial": self.allow_partial or None}
        return [name for name, value in own.items() if value is not None] + [f"--{name}" for name in self.form]


class Opened(NamedTuple):
    """What a source holds: a whole network, or the tensors of a backbone alone."""

    name: str
    network: Segmenter | None
    metadata: dict[str, Any]  # of a network; empty where its classes have no names
    backbone: dict[str, Tensor]
    complete: bool = True  # everything matched


class Writer(NamedTuple):
    """One kind of destination."""

    write: Callable[[Request, Opened], int]
    ours: bool  # takes a whole checkpoint of ours, nothing else
    options: frozenset[str]  # that belong to it
    refusal: str  # what follows the name of an option that does not


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
    """Converts weights; `destination`'s suffix says into what: .safetensors ours, .pth the official names, .onnx and
    .pt2 exports, for which `form` has what was given of `Form`'s fields.

    `model`, `classifier`: None reads them from the file. `dataset`: names the classes of official weights; a published
    data set or a recipe. `classes`: the classes that .safetensors gets instead, see `requested_classes`; the
    classifier's rows follow the names. `deploy`: a small .safetensors, see `deploy`. Returns 0, or 1 where only a part
    of the weights matched, or no class name. Raises CommandError, having written nothing, where an option does not
    belong to the destination, and where tensors do not match unless `allow_partial` is set.
    """
    request = Request(source, destination, model, classifier, dataset, classes, allow_partial, deploy, form or {})
    writer = find_writer(request)
    opened = open_ours(request) if writer.ours else open_any(request)
    opened, known = relabel(request, opened)
    code = writer.write(request, opened)
    if not opened.complete:
        click.echo("warning: partial; tensors that did not match keep fresh weights", err=True)
    return code or int(not (opened.complete and known))


def find_writer(request: Request) -> Writer:
    """The writer of the destination. Raises CommandError for an unknown suffix and options of other writers."""
    suffix, destination = request.destination.suffix.lower(), request.destination
    if suffix not in WRITERS:
        raise CommandError(
            f"{destination}: no conversion to {destination.suffix or 'a file without suffix'}\n"
            "expected .safetensors (ours, from official weights) or .pth (official names, from ours), .onnx or .pt2"
        )
    if destination.exists() and destination.samefile(request.source):
        raise CommandError(f"{destination}: source and destination are the same file\ngive the result another name")
    if request.deploy and suffix != ".safetensors":
        raise CommandError(
            f"--deploy: only for .safetensors, not {destination}\nleave it out: .onnx and .pt2 are deploy forms already"
        )
    writer = DEPLOY if request.deploy else WRITERS[suffix]
    wrong = next((option for option in request.options() if option not in writer.options), None)
    if wrong is not None and request.deploy:
        raise CommandError(f"{wrong}: not with --deploy, which takes a whole checkpoint of ours\n{writer.refusal}")
    if wrong is not None:
        homes = [suffix for suffix, each in WRITERS.items() if wrong in each.options]
        what = "official weights to .safetensors" if wrong in OFFICIAL_ONLY else " and ".join(homes)
        raise CommandError(f"{wrong}: only for {what}, not {destination}\n{writer.refusal}")
    return writer


# ---- opening -------------------------------------------------------------------------------------------------------


def open_ours(request: Request) -> Opened:
    """A checkpoint of ours, whole unless an export is made of it; what the options say of it must be true."""
    source = request.source
    try:
        network, metadata = load_model(source)
    except CheckpointError:
        if source.suffix.lower() == ".safetensors":
            raise
        raise CommandError(
            f"{source}: is not a checkpoint of ours\nfirst: ssaseg convert {source} OURS.safetensors"
        ) from None
    require_finite(source, network.state_dict())
    if "deploy" in metadata and request.destination.suffix.lower() not in EXPORTS:
        raise CommandError(
            f"{source}: is a deploy form, without what training needs\n"
            "convert the checkpoint that it was made from; from this one only .onnx and .pt2 can be made"
        )
    for option, given, own in (
        ("--model", request.model, network.name),
        ("--classifier", request.classifier, network.classifier_name),
    ):
        if given not in (None, own):
            raise CommandError(f"{source}: its header says {own}, {option} says {given}\nleave {option} out")
    return Opened(network.name, network, metadata, {})


def open_any(request: Request) -> Opened:
    """Official weights, or a checkpoint of ours that gets other classes."""
    source, weights = request.source, read_weights(request.source)
    if weights.is_backbone and request.classes is not None:
        raise CommandError(f"{source}: holds a backbone alone, and no class for --classes to keep\nleave it out")
    if weights.header is None:
        name = model_name(source, weights, request.model)
        if weights.is_backbone:
            return open_backbone(request, weights, name)
        return open_official(request, weights, name)
    if request.classes is None:
        raise CommandError(
            f"{source}: is a file of ssaseg already (format {weights.header['format']})\n"
            "for official names let DESTINATION end in .pth; for other classes use --classes"
        )
    if request.dataset is not None:
        raise CommandError(f"{source}: its header names its classes; --dataset is for official files\nleave it out")
    return open_ours(request)


def open_official(request: Request, weights: Weights, name: str) -> Opened:
    """A whole official segmentation network."""
    source, classes = request.source, count_rows(weights.tensors.get(CLASSES_KEY))
    if classes == 0:
        raise CommandError(
            f"{source}: has no {CLASSES_KEY} with a row for each class\nexpected it, to count the classes"
        )
    network = fresh(name, classes, request.classifier or ("ssa" if SSA_KEY in weights.tensors else "linear"))
    heading = describe_source(source, weights, f"{name}, {network.classifier_name}, {classes} classes")
    found, tensors = match(network, weights, heading)
    click.echo(found)
    if not (found.complete or (request.allow_partial and found.matched)):
        raise CommandError(explain_mismatch(source, weights, network, found))
    network.load_state_dict(tensors, strict=False)
    metadata = own_classes(source, request.dataset, weights.meta or {}, classes)
    return Opened(name, network, metadata, {}, found.complete)


def open_backbone(request: Request, weights: Weights, name: str) -> Opened:
    """A pre-trained backbone alone."""
    network = fresh(name, 2, "linear")
    found, tensors = match(network, weights, describe_source(request.source, weights, f"{name}, backbone alone"))
    click.echo(found)
    if found.backbone_share < PRETRAINED_SHARE and not (request.allow_partial and found.matched):
        raise CommandError(explain_mismatch(request.source, weights, network, found))
    return Opened(name, None, {}, tensors, found.complete)


def model_name(source: Path, weights: Weights, given: str | None) -> str:
    """The network that official weights are for. Raises CommandError where neither the option nor the file says it."""
    if given in list_models():
        return str(given)
    if given is not None:
        raise CommandError(f"--model {given}: no such network\nexpected one of: {', '.join(list_models())}")
    name, fitting = likely_model(weights)
    if fitting < 1:
        raise CommandError(
            f"{source}: cannot tell which network this is: {best_guess(name, fitting)}\n"
            f"name it with --model, one of: {', '.join(list_models())}"
        )
    return name


def fresh(name: str, classes: int, classifier: str) -> Segmenter:
    """A network whose fresh weights are always the same; the caller's random numbers are not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model(name, classes, classifier)


def explain_mismatch(source: Path, weights: Weights, network: Segmenter, found: Match) -> str:
    """Why a file was refused, what it looks like, and the fix; three lines."""
    first = (
        f"{source}: does not fit {network.name} with {network.classifier_name}: {len(found.missing)} missing, "
        f"{len(found.unexpected)} unexpected, {len(found.misshapen)} of another shape"
    )
    holds_ssa = SSA_KEY in weights.tensors
    if found.backbone_share == 1 and holds_ssa != (network.classifier_name == "ssa"):
        looks, other = (f"it has {SSA_KEY}", "ssa") if holds_ssa else (f"it has no {SSA_KEY}", "linear")
        return f"{first}\nit looks like {other}: {looks}\nuse --classifier {other}"
    name, fitting = likely_model(weights)
    if name != network.name and fitting > found.backbone_share:
        return f"{first}\n{best_guess(name, fitting)}\nuse --model {name}"
    example = next(iter([*found.misshapen, *found.missing, *found.unexpected]))
    return f"{first}\nfirst: {example}\n--allow-partial converts what fits"


# ---- other classes ---------------------------------------------------------------------------------------------------


def relabel(request: Request, opened: Opened) -> tuple[Opened, bool]:
    """The network with the classes of `--classes`, where given, and whether any of them was known before."""
    if request.classes is None or opened.network is None:
        return opened, True
    requested = requested_classes(request.classes)
    if not opened.metadata:
        raise CommandError(
            f"{request.source}: its classes have no names for --classes to keep\nname them with --dataset"
        )
    other = fresh(opened.name, len(requested["classes"]), opened.network.classifier_name)
    metadata, known = follow_names(opened.network, opened.metadata, requested, other)
    return opened._replace(network=other, metadata=metadata), known


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_ours(request: Request, opened: Opened) -> int:
    """A checkpoint of ours, or a backbone alone; see the module's docstring for what that file is."""
    if opened.network is not None:
        save_model(request.destination, opened.network, opened.metadata)
        click.echo(f"wrote {request.destination}")
        return 0
    write_tensors(request.destination, opened.backbone, {"format": BACKBONE_FORMAT, "model": opened.name})
    click.echo(f"wrote {request.destination}: weights to start from, for a recipe's model.pretrained")
    return 0


def write_official(request: Request, opened: Opened) -> int:
    """One of our checkpoints under official names, as mmsegmentation 0.x reads them."""
    network, metadata = whole(opened), opened.metadata
    state, official = network.state_dict(), {}
    for entry in official_entries(network):
        official.update(entry.give(state))
    for key, others in aliases(network, list(official)).items():
        official.update(dict.fromkeys(others, official[key]))
    meta = {"CLASSES": metadata["classes"], "PALETTE": metadata["palette"]}
    buffer = BytesIO()
    torch.save({"state_dict": official, "meta": meta}, buffer)
    write_atomic(request.destination, buffer.getvalue())
    click.echo(f"wrote {request.destination}: {len(official)} tensors of {network.name}, {network.classifier_name}")
    lacking = left_out(network)
    click.echo(f"left out, official keys that our models do not have: {len(lacking) or 'none'}")
    for key, reason in lacking.items():
        click.echo(f"  {key} ({reason})")
    return 0


def write_small(request: Request, opened: Opened) -> int:
    """The deploy form of one of our checkpoints."""
    return write_deploy(request.source, request.destination, whole(opened), opened.metadata)


def write_graph(request: Request, opened: Opened) -> int:
    """.onnx or .pt2."""
    return write_export(request.source, request.destination, whole(opened), opened.metadata, Form(**request.form))


def whole(opened: Opened) -> Segmenter:
    """The network of a source that was opened as a checkpoint of ours."""
    assert opened.network is not None
    return opened.network


EXPORTS = (".onnx", ".pt2")
OFFICIAL_ONLY = ("--dataset", "--allow-partial")
WRITERS = {
    ".safetensors": Writer(write_ours, False, frozenset({"--dataset", "--classes", "--allow-partial"}), "leave it out"),
    ".pth": Writer(write_official, True, frozenset(), "leave it out, or convert to .safetensors first"),
    **dict.fromkeys(
        EXPORTS,
        Writer(
            write_graph,
            True,
            frozenset({"--output", "--input", "--size", "--verify"}),
            "leave it out, or convert to .safetensors first",
        ),
    ),
}
DEPLOY = Writer(write_small, True, frozenset(), "convert without --deploy first, then make the result smaller")
