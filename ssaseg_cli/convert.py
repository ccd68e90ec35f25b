"""`ssaseg convert`, and the weights that `train` starts from: foreign tensors come in through one visible table.

What an ImageNet checkpoint becomes: it has no classifier, so it is no model that could predict. The file holds the
backbone's tensors alone under our keys, with format "ssaseg-backbone-1" in its header. `model.pretrained` of a recipe
takes it; `load_model` refuses it, naming the format.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from ssaseg.cli.console import CommandError
from ssaseg.cli.foreign import Weights, read_weights
from ssaseg.datasets import synthetic
from ssaseg.datasets.labels import label_space, list_label_spaces
from ssaseg.models import Segmenter, build_model, list_models, load_model, save_model
from ssaseg.models.checkpoint import write_atomic, write_tensors
from ssaseg.models.upstream import CLASSES_KEY, DERIVED, LEFT_OUT, NOT_USED, SSA_KEY, official_keys

BACKBONE_FORMAT = "ssaseg-backbone-1"
PRETRAINED_SHARE = 0.95  # of the backbone's tensors, that a pre-trained file must bring
LISTED = 8  # names shown of each list


@dataclass(frozen=True)
class Report:
    """How a file's tensors fit a model; `str` of it is for readers.

    Lists hold the file's own names, counters and derived indices left aside.
    """

    heading: str  # what was read, as what
    matched: Sequence[str]
    missing: Sequence[str]
    unexpected: Sequence[str]
    misshapen: Sequence[str]  # with both shapes
    not_used: Sequence[str]  # known to hold nothing that a model computes with
    backbone: tuple[int, int]  # matched, wanted

    @property
    def backbone_share(self) -> float:
        """Matched share of the backbone's tensors, 0 to 1."""
        return self.backbone[0] / max(self.backbone[1], 1)

    @property
    def complete(self) -> bool:
        """Every tensor matched, and none left over that is not known to be of no use."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        wanted = len(self.matched) + len(self.missing) + len(self.misshapen)
        share, backbone = _share(len(self.matched), wanted), _share(*self.backbone)
        lists = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "wrong shape": self.misshapen,
            "not used": self.not_used,
        }
        lines = [self.heading, f"  matched      {share}; backbone {backbone}"]
        lines += [f"  {title:12} {len(names)}{': ' if names else ''}{_listed(names)}" for title, names in lists.items()]
        return "\n".join(lines)


def _share(count: int, wanted: int) -> str:
    return f"{count} of {wanted} ({100 * count / max(wanted, 1):.1f} %)"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def match(
    own: Mapping[str, Tensor], names: Mapping[str, str], found: Mapping[str, Tensor], heading: str = ""
) -> tuple[Report, dict[str, Tensor]]:
    """Fits a file's tensors to a state dict: (report, tensors by our key, where present and of the right shape).

    `own`: our state dict; `names`: our key → the file's, for the keys wanted; `found`: the file's tensors.
    """
    fits = {ours: theirs in found and found[theirs].shape == own[ours].shape for ours, theirs in names.items()}
    # What may be there or not is taken where it is there, but counts nowhere: shares are of tensors that matter.
    wanted = {ours: theirs for ours, theirs in names.items() if not theirs.endswith(DERIVED)}
    fitting = [ours for ours in wanted if fits[ours]]
    known = set(names.values())
    left = [key for key in found if key not in known and not key.endswith(DERIVED)]
    not_used = [key for key in left if key.startswith(tuple(NOT_USED))]
    report = Report(
        heading=heading,
        matched=[wanted[ours] for ours in fitting],
        missing=[theirs for theirs in wanted.values() if theirs not in found],
        unexpected=[key for key in left if key not in not_used],
        misshapen=[
            f"{theirs} {tuple(found[theirs].shape)}, expected {tuple(own[ours].shape)}"
            for ours, theirs in wanted.items()
            if theirs in found and not fits[ours]
        ],
        not_used=not_used,
        backbone=(len(_backbone_keys(fitting)), len(_backbone_keys(wanted))),
    )
    return report, {ours: found[names[ours]] for ours in names if fits[ours]}


def _backbone_keys(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if key.startswith("backbone.")]


# ---- the command -------------------------------------------------------------------------------------------------


def run_convert(
    source: Path,
    destination: Path,
    model: str | None,
    classifier: str | None,
    dataset: str | None,
    allow_partial: bool,
) -> int:
    """Converts weights; `destination`'s suffix says into what: .safetensors ours, .pth the official names.

    `model`, `classifier`: None reads them off the file. `dataset`: of the class names; a published data set or a
    recipe. Returns 0, or 1 where only a part of the weights matched. Raises CommandError,
    having written nothing, where tensors do not match and `allow_partial` does not say to go on.
    """
    if destination.suffix.lower() not in (".safetensors", ".pth"):
        raise CommandError(
            f"{destination}: no conversion to {destination.suffix or 'a file without suffix'}\n"
            "expected .safetensors (ours, from official weights) or .pth (official names, from ours)"
        )
    if destination.exists() and destination.samefile(source):
        raise CommandError(f"{destination}: source and destination are the same file\ngive the result another name")
    if destination.suffix.lower() == ".pth":
        return _to_official(source, destination, model, classifier)
    weights = read_weights(source)
    if weights.header is not None:
        raise CommandError(
            f"{source}: is a file of ssaseg already (format {weights.header['format']})\n"
            "for official names let DESTINATION end in .pth"
        )
    name = _model_name(source, weights.tensors, model)
    if weights.is_backbone:
        return _backbone_from_official(source, destination, weights, name, allow_partial)
    return _from_official(source, destination, weights, name, classifier, dataset, allow_partial)


def _from_official(
    source: Path,
    destination: Path,
    weights: Weights,
    name: str,
    classifier: str | None,
    dataset: str | None,
    allow_partial: bool,
) -> int:
    """A whole segmentation network."""
    found = weights.tensors
    classes = _rows(found.get(CLASSES_KEY))
    if classes == 0:
        raise CommandError(f"{source}: holds no {CLASSES_KEY}\nexpected it to tell the number of classes")
    holds = "ssa" if SSA_KEY in found else "linear"
    network = _fresh(name, classes, classifier or holds)
    heading = _heading(source, weights, f"{name}, {network.classifier_name}, {classes} classes")
    report, tensors = match(network.state_dict(), official_keys(network), found, heading)
    click.echo(report)
    if not (report.complete or (allow_partial and report.matched)):
        raise CommandError(_misfit(source, found, network, report))
    metadata = _labels(source, dataset, weights.meta or {}, classes)
    network.load_state_dict(tensors, strict=False)
    save_model(destination, network, metadata)
    click.echo(f"wrote {destination}")
    if not report.complete:
        click.echo("warning: partial; what was not matched keeps fresh weights", err=True)
    return 0 if report.complete else 1


def _backbone_from_official(source: Path, destination: Path, weights: Weights, name: str, allow_partial: bool) -> int:
    """A pre-trained backbone alone; see the module's docstring for what the file is."""
    network = _fresh(name, 2, "linear")
    names = {key: theirs for key, theirs in official_keys(network).items() if key.startswith("backbone.")}
    heading = _heading(source, weights, f"{name}, backbone alone")
    report, tensors = match(network.state_dict(), names, weights.tensors, heading)
    click.echo(report)
    if report.backbone_share < PRETRAINED_SHARE and not (allow_partial and report.matched):
        raise CommandError(_misfit(source, weights.tensors, network, report))
    write_tensors(destination, tensors, {"format": BACKBONE_FORMAT, "model": name})
    click.echo(f"wrote {destination}: weights to start from, for a recipe's model.pretrained")
    if not report.complete:
        click.echo("warning: partial; see the lists above", err=True)
    return 0 if report.complete else 1


def _to_official(source: Path, destination: Path, model: str | None, classifier: str | None) -> int:
    """One of our checkpoints under official names, as mmseg 0.x reads them."""
    network, metadata = load_model(source)
    for option, wished, own in (
        ("--model", model, network.name),
        ("--classifier", classifier, network.classifier_name),
    ):
        if wished not in (None, own):
            raise CommandError(f"{source}: its header says {own}, {option} says {wished}\nleave {option} out")
    state = network.state_dict()
    official = {theirs: state[ours] for ours, theirs in official_keys(network).items()}
    meta = {"CLASSES": metadata["classes"], "PALETTE": metadata["palette"]}
    buffer = BytesIO()
    torch.save({"state_dict": official, "meta": meta}, buffer)
    write_atomic(destination, buffer.getvalue())
    left_out = LEFT_OUT[network.classifier_name]
    click.echo(f"wrote {destination}: {len(official)} tensors of {network.name}, {network.classifier_name}")
    click.echo(f"left out, official keys that our models do not hold: {len(left_out)}")
    for key in left_out:
        click.echo(f"  {key} ({NOT_USED[key]})")
    return 0


def _heading(path: Path, weights: Weights, reading: str) -> str:
    return f"{path}: {len(weights.tensors)} tensors ({weights.nesting}), read as {reading}"


def _fresh(name: str, classes: int, classifier: str) -> Segmenter:
    """A network whose fresh weights are always the same, and which leaves the caller's random numbers alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model(name, classes, classifier)


def _rows(tensor: Tensor | None) -> int:
    """Length of the first dimension; 0 where there is none."""
    return tensor.shape[0] if tensor is not None and tensor.dim() else 0


# ---- telling files apart -----------------------------------------------------------------------------------------


def likely_model(found: Mapping[str, Tensor]) -> tuple[str, float]:
    """The network whose backbone the official tensors fit best, and the share that fits, 0 to 1."""
    shares = {}
    for name in list_models():
        network = _fresh(name, 2, "linear")
        shares[name] = match(network.state_dict(), official_keys(network), found)[0].backbone_share
    best = max(shares, key=lambda name: shares[name])
    return best, shares[best]


def _model_name(source: Path, found: Mapping[str, Tensor], wished: str | None) -> str:
    if wished in list_models():
        return str(wished)
    if wished is not None:
        raise CommandError(f"--model {wished}: no such network\nexpected one of: {', '.join(list_models())}")
    name, share = likely_model(found)
    if share < 1:
        raise CommandError(
            f"{source}: which network is it? {_best_guess(name, share)}\n"
            f"say it with --model, one of: {', '.join(list_models())}"
        )
    return name


def _best_guess(name: str, share: float) -> str:
    return f"its tensors look like {name} ({100 * share:.0f} % of that backbone)" if share else "no network here fits"


def _misfit(source: Path, found: Mapping[str, Tensor], network: Segmenter, report: Report) -> str:
    """Why a file was refused, what it looks like, and the mend; three lines."""
    first = (
        f"{source}: does not fit {network.name} with {network.classifier_name}: {len(report.missing)} missing, "
        f"{len(report.unexpected)} unexpected, {len(report.misshapen)} of another shape"
    )
    holds_ssa = SSA_KEY in found
    if report.backbone_share == 1 and holds_ssa != (network.classifier_name == "ssa"):
        looks, other = (f"{SSA_KEY} is there", "ssa") if holds_ssa else (f"there is no {SSA_KEY}", "linear")
        return f"{first}\nit looks like {other}: {looks}\nuse --classifier {other}"
    name, share = likely_model(found)
    if name != network.name and share > report.backbone_share:
        return f"{first}\n{_best_guess(name, share)}\nuse --model {name}"
    example = next(iter([*report.misshapen, *report.missing, *report.unexpected]))
    return f"{first}\nfirst: {example}\n--allow-partial converts what fits"


def _labels(source: Path, dataset: str | None, meta: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """Metadata about classes: by the option, the file itself, or the count of ADE20K; else empty, to be numbered."""
    stated = meta.get("CLASSES")
    if dataset is None and isinstance(stated, list | tuple) and len(stated) == classes:
        same = [name for name in list_label_spaces() if label_space(name).classes == list(stated)]
        if not same:
            palette = meta.get("PALETTE")
            return {"classes": [str(c) for c in stated], "palette": _palette(palette, classes)}
        dataset = same[0]
    if dataset is None and classes == len(label_space("ade20k").classes):
        dataset = "ade20k"
    if dataset is None:
        click.echo(f"  classes      {classes} without names, so numbered; --dataset would name them")
        return {}
    metadata = dataset_metadata(dataset)
    if len(metadata["classes"]) != classes:
        raise CommandError(
            f"--dataset {dataset} has {len(metadata['classes'])} classes, {source} has {classes}\n"
            f"expected one with as many; known: {', '.join(list_label_spaces())}, or a recipe"
        )
    click.echo(f"  classes      of {dataset}")
    return metadata


def _palette(palette: Any, classes: int) -> list[list[int]] | None:
    """A foreign file's palette as our metadata has it; None where it is not one RGB triple in 0..255 per class."""
    try:
        colours = [[int(value) for value in colour] for colour in palette]
    except (TypeError, ValueError):
        return None
    fits = len(colours) == classes and all(len(c) == 3 and 0 <= min(c) <= max(c) <= 255 for c in colours)
    return colours if fits else None


def dataset_metadata(name: str) -> dict[str, Any]:
    """Checkpoint metadata (classes, palette, protocol, ...) of a published data set, or of a recipe's data.

    Raises CommandError where there is neither.
    """
    if name in list_label_spaces():
        return label_space(name)._asdict()
    from ssaseg.recipes import RecipeError, load_recipe

    try:
        recipe = load_recipe(name)
    except RecipeError:
        raise CommandError(
            f"--dataset {name}: no such data set\nexpected one of: {', '.join(list_label_spaces())}, or a recipe"
        ) from None
    data, test = recipe.data, recipe.test
    scenes = data.dataset == "synthetic"  # whose classes no recipe states
    palette = synthetic.PALETTE if scenes else data.palette
    return {
        "classes": list(synthetic.CLASSES if scenes else data.classes),
        "palette": palette and [list(colour) for colour in palette],
        "mean": list(data.mean),
        "std": list(data.std),
        "protocol": {"scale": test.scale and list(test.scale), "multiple": test.multiple},
    }


# ---- weights that training starts from ---------------------------------------------------------------------------


def load_pretrained(model: Segmenter, path: str | Path) -> Report:
    """Loads what fits of a checkpoint into `model` and returns the report, which the caller prints.

    Takes an ImageNet checkpoint (backbone alone), an official segmentation checkpoint, or a file of ours, of a whole
    model or of a backbone. Beyond the backbone every tensor of the same name and shape is taken; class rows start
    fresh where the number of classes differs. Raises CommandError where less than 95 % of the backbone's tensors
    match, FileNotFoundError where there is no file; `model` is then as before.
    """
    try:
        weights = read_weights(Path(path))
    except (CommandError, FileNotFoundError) as error:  # both begin with the path
        raise type(error)(f"model.pretrained={error}") from None
    header, found = weights.header, weights.tensors
    names = official_keys(model) if header is None else {key: key for key in model.state_dict()}
    reading = f"{model.name} to start from"
    if weights.is_backbone:
        names = {key: names[key] for key in _backbone_keys(names)}
        reading += ", backbone alone"
    classes = _rows(found.get(names.get("classifier.conv_seg.weight", "")))
    if classes not in (0, model.num_classes):
        reading += f"; {classes} classes there, {model.num_classes} here: class rows start fresh"
    report, tensors = match(model.state_dict(), names, found, _heading(Path(path), weights, reading))
    if report.backbone_share < PRETRAINED_SHARE:
        click.echo(report, err=True)
        looks = _best_guess(*likely_model(found)) if header is None else f"its header says {header.get('model')}"
        raise CommandError(
            f"model.pretrained={path}: only {_share(*report.backbone)} of {model.name}'s backbone match\n"
            f"expected at least {100 * PRETRAINED_SHARE:.0f} %; {looks}\nname another file, or another model.name"
        )
    model.load_state_dict(tensors, strict=False)
    return report
