"""`ssaseg convert`, and the weights that `train` starts from: foreign tensors come in through one visible table.

What a file is and how it fits a network: `foreign`, `matching`; what its classes are called: `classmap`.

What an ImageNet checkpoint becomes: it has no classifier, so it is no model that could predict. The file holds the
backbone's tensors alone under our keys, with format "ssaseg-backbone-1" in its header. `model.pretrained` of a recipe
takes it; `load_model` refuses it, naming the format.
"""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import torch

from ssaseg.cli.errors import CommandError
from ssaseg.cli.weights.classes import follow_names, own_classes, wished_classes
from ssaseg.cli.weights.deploy import run_lean
from ssaseg.cli.weights.export import Form, run_export
from ssaseg.cli.weights.foreign import Weights, _rows, read_weights, require_finite
from ssaseg.cli.weights.matching import Report, _best_guess, _heading, likely_model, match
from ssaseg.cli.weights.pretrained import PRETRAINED_SHARE
from ssaseg.models import Segmenter, build_model, list_models, load_model, save_model
from ssaseg.models.checkpoint import CheckpointError, write_atomic, write_tensors
from ssaseg.models.keys import CLASSES_KEY, SSA_KEY, aliases, left_out, official_keys

BACKBONE_FORMAT = "ssaseg-backbone-1"


# ---- the command -------------------------------------------------------------------------------------------------
def run_convert(
    source: Path,
    destination: Path,
    model: str | None,
    classifier: str | None,
    dataset: str | None,
    allow_partial: bool,
    form: Mapping[str, Any] | None = None,
    classes: str | None = None,
    deploy: bool = False,
) -> int:
    """Converts weights; `destination`'s suffix says into what: .safetensors ours, .pth the official names.

    .onnx and .pt2 are deploy forms, for which `form` has what is stated of `Form`.

    `model`, `classifier`: None reads them off the file. `dataset`: of the class names; a published data set or a
    recipe. `classes`: of the class names that .safetensors is to have instead, see `wished_classes`; the classifier's
    rows follow the names. `deploy`: .safetensors is to be a small one, see `lean`. Returns 0, or 1 where only a part of
    the weights matched, or no name. Raises CommandError, having written nothing, where tensors do not match and
    `allow_partial` does not say to go on.
    """
    if destination.suffix.lower() not in (".safetensors", ".pth", ".onnx", ".pt2"):
        raise CommandError(
            f"{destination}: no conversion to {destination.suffix or 'a file without suffix'}\n"
            "expected .safetensors (ours, from official weights) or .pth (official names, from ours), .onnx or .pt2"
        )
    if destination.exists() and destination.samefile(source):
        raise CommandError(f"{destination}: source and destination are the same file\ngive the result another name")
    if deploy:
        if destination.suffix.lower() != ".safetensors" or dataset or allow_partial or form or classes is not None:
            raise CommandError(
                f"{destination}: --deploy makes a small .safetensors of one of ours, and takes no such option\n"
                "convert to ours first; .onnx and .pt2 are deploy forms already"
            )
        return run_lean(source, destination, *_open_ours(source, model, classifier, whole=True))
    if classes is not None and destination.suffix.lower() != ".safetensors":
        raise CommandError(f"--classes: only for .safetensors, not {destination}\nconvert to .safetensors first")
    if destination.suffix.lower() != ".safetensors":
        for option, given in (("--dataset", dataset), ("--allow-partial", allow_partial)):
            if given:
                raise CommandError(f"{option}: only for official weights to .safetensors\nleave it out")
    if destination.suffix.lower() in (".onnx", ".pt2"):
        return run_export(source, destination, *_open_ours(source, model, classifier), Form(**(form or {})))
    if form:
        raise CommandError(f"--{next(iter(form))}: only .onnx and .pt2 have it, not {destination}\nleave it out")
    if destination.suffix.lower() == ".pth":
        return _to_official(destination, *_open_ours(source, model, classifier, whole=True))
    wished = None if classes is None else wished_classes(classes)
    weights = read_weights(source)
    if wished is not None and weights.is_backbone:
        raise CommandError(f"{source}: holds a backbone alone, and no class that --classes could keep\nleave it out")
    if weights.header is not None:
        if wished is None:
            raise CommandError(
                f"{source}: is a file of ssaseg already (format {weights.header['format']})\n"
                "for official names let DESTINATION end in .pth; for other classes name them by --classes"
            )
        if dataset is not None:
            raise CommandError(f"{source}: its header names its classes, --dataset is for official files\nleave it out")
        return _write(destination, *_open_ours(source, model, classifier, whole=True), wished)
    name = _model_name(source, weights, model)
    if weights.is_backbone:
        return _backbone_from_official(source, destination, weights, name, allow_partial)
    network, report = _from_official(source, weights, name, classifier, allow_partial)
    metadata = own_classes(source, dataset, weights.meta or {}, network.num_classes)
    if wished is not None and not metadata:
        raise CommandError(f"{source}: its classes have no names that --classes could keep\nname them by --dataset")
    code = _write(destination, network, metadata, wished)
    if not report.complete:
        click.echo("warning: partial; what was not matched keeps fresh weights", err=True)
    return code if report.complete else 1


def _from_official(
    source: Path, weights: Weights, name: str, classifier: str | None, allow_partial: bool
) -> tuple[Segmenter, Report]:
    """A whole segmentation network."""
    classes = _rows(weights.tensors.get(CLASSES_KEY))
    if classes == 0:
        raise CommandError(f"{source}: holds no {CLASSES_KEY} with a row per class\nexpected it, to count classes by")
    network = _fresh(name, classes, classifier or ("ssa" if SSA_KEY in weights.tensors else "linear"))
    heading = _heading(source, weights, f"{name}, {network.classifier_name}, {classes} classes")
    report, tensors = match(network, weights, heading)
    click.echo(report)
    if not (report.complete or (allow_partial and report.matched)):
        raise CommandError(_misfit(source, weights, network, report))
    network.load_state_dict(tensors, strict=False)
    return network, report


def _write(destination: Path, network: Segmenter, metadata: dict[str, Any], wished: dict[str, Any] | None) -> int:
    """A file of ours, with other classes where they are wished; 1 where none of them was known before."""
    known = True
    if wished is not None:
        other = _fresh(network.name, len(wished["classes"]), network.classifier_name)
        metadata, known = follow_names(network, metadata, wished, other)
        network = other
    save_model(destination, network, metadata)
    click.echo(f"wrote {destination}")
    return 0 if known else 1


def _backbone_from_official(source: Path, destination: Path, weights: Weights, name: str, allow_partial: bool) -> int:
    """A pre-trained backbone alone; see the module's docstring for what the file is."""
    network = _fresh(name, 2, "linear")
    report, tensors = match(network, weights, _heading(source, weights, f"{name}, backbone alone"))
    click.echo(report)
    if report.backbone_share < PRETRAINED_SHARE and not (allow_partial and report.matched):
        raise CommandError(_misfit(source, weights, network, report))
    write_tensors(destination, tensors, {"format": BACKBONE_FORMAT, "model": name})
    click.echo(f"wrote {destination}: weights to start from, for a recipe's model.pretrained")
    if not report.complete:
        click.echo("warning: partial; see the lists above", err=True)
    return 0 if report.complete else 1


def _to_official(destination: Path, network: Segmenter, metadata: dict[str, Any]) -> int:
    """One of our checkpoints under official names, as mmseg 0.x reads them."""
    state = network.state_dict()
    keys = official_keys(network)
    further = aliases(keys.values())
    official = {name: state[ours] for ours, key in keys.items() for name in (key, *further.get(key, ()))}
    meta = {"CLASSES": metadata["classes"], "PALETTE": metadata["palette"]}
    buffer = BytesIO()
    torch.save({"state_dict": official, "meta": meta}, buffer)
    write_atomic(destination, buffer.getvalue())
    click.echo(f"wrote {destination}: {len(official)} tensors of {network.name}, {network.classifier_name}")
    lacking = left_out(network)
    click.echo(f"left out, official keys that our models do not hold: {len(lacking) or 'none'}")
    for key, reason in lacking.items():
        click.echo(f"  {key} ({reason})")
    return 0


def _open_ours(
    source: Path, model: str | None, classifier: str | None, whole: bool = False
) -> tuple[Segmenter, dict[str, Any]]:
    """Network and metadata; what the options say of it must be so, its weights numbers, and all there if `whole`."""
    try:
        network, metadata = load_model(source)
    except CheckpointError:
        if source.suffix.lower() == ".safetensors":
            raise
        raise CommandError(
            f"{source}: is no checkpoint of ours\nfirst: ssaseg convert {source} OURS.safetensors"
        ) from None
    require_finite(source, network.state_dict())
    if whole and "deploy" in metadata:
        raise CommandError(
            f"{source}: is a deploy form, without what training needs\n"
            "convert the checkpoint that it was made of; from this one only .onnx and .pt2 can be made"
        )
    for option, wished, own in (
        ("--model", model, network.name),
        ("--classifier", classifier, network.classifier_name),
    ):
        if wished not in (None, own):
            raise CommandError(f"{source}: its header says {own}, {option} says {wished}\nleave {option} out")
    return network, metadata


def _fresh(name: str, classes: int, classifier: str) -> Segmenter:
    """A network whose fresh weights are always the same, and which leaves the caller's random numbers alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model(name, classes, classifier)


# ---- telling files apart -----------------------------------------------------------------------------------------
def _model_name(source: Path, weights: Weights, wished: str | None) -> str:
    if wished in list_models():
        return str(wished)
    if wished is not None:
        raise CommandError(f"--model {wished}: no such network\nexpected one of: {', '.join(list_models())}")
    name, fitting = likely_model(weights)
    if fitting < 1:
        raise CommandError(
            f"{source}: which network is it? {_best_guess(name, fitting)}\n"
            f"say it with --model, one of: {', '.join(list_models())}"
        )
    return name


def _misfit(source: Path, weights: Weights, network: Segmenter, report: Report) -> str:
    """Why a file was refused, what it looks like, and the mend; three lines."""
    first = (
        f"{source}: does not fit {network.name} with {network.classifier_name}: {len(report.missing)} missing, "
        f"{len(report.unexpected)} unexpected, {len(report.misshapen)} of another shape"
    )
    holds_ssa = SSA_KEY in weights.tensors
    if report.backbone_share == 1 and holds_ssa != (network.classifier_name == "ssa"):
        looks, other = (f"{SSA_KEY} is there", "ssa") if holds_ssa else (f"there is no {SSA_KEY}", "linear")
        return f"{first}\nit looks like {other}: {looks}\nuse --classifier {other}"
    name, fitting = likely_model(weights)
    if name != network.name and fitting > report.backbone_share:
        return f"{first}\n{_best_guess(name, fitting)}\nuse --model {name}"
    example = next(iter([*report.misshapen, *report.missing, *report.unexpected]))
    return f"{first}\nfirst: {example}\n--allow-partial converts what fits"
