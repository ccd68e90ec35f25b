"""Families and classifiers by name, and the networks built from them. Mask methods have no classifier to choose."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from ssaseg.models.classifiers.base import Classifier, Loss, LossOptions, Option
from ssaseg.models.classifiers.cac import CACClassifier
from ssaseg.models.classifiers.dnc import DNCClassifier
from ssaseg.models.classifiers.gmmseg import GMMSegClassifier
from ssaseg.models.classifiers.linear import LinearClassifier
from ssaseg.models.classifiers.protoseg import ProtoSegClassifier
from ssaseg.models.classifiers.ssa import SSAClassifier
from ssaseg.models.decoder import FURTHER_WEIGHT
from ssaseg.models.masks import peers, pem, yoso
from ssaseg.models.masks.base import MASKS, MaskSegmenter, no_training
from ssaseg.models.networks import (
    afformer,
    cgrseg,
    fcn,
    lite0,
    ocrnet,
    seaformer,
    segformer,
    segformer_nvidia,
    segnext,
    upernet,
)
from ssaseg.models.networks.family import Family, Parts
from ssaseg.models.segmenter import Segmenter
from ssaseg.models.stem import RGB, widen

FAMILIES: Mapping[str, Family] = {
    "afformer": afformer.FAMILY,
    "cgrseg": cgrseg.FAMILY,
    "fcn": fcn.FAMILY,
    "lite0": lite0.FAMILY,
    "ocrnet": ocrnet.FAMILY,
    "seaformer": seaformer.FAMILY,
    "segformer": segformer.FAMILY,
    "segformer_nvidia": segformer_nvidia.FAMILY,
    "segnext": segnext.FAMILY,
    "upernet": upernet.FAMILY,
    "vit_adapter": upernet.ADAPTER_FAMILY,
}
MASK_FAMILIES: Mapping[str, Family] = {
    "mask2former": peers.MASK2FORMER_FAMILY,
    "maskformer": peers.MASKFORMER_FAMILY,
    "pem": pem.FAMILY,
    "yoso": yoso.FAMILY,
}
CLASSIFIERS: dict[str, type[Classifier]] = {
    "linear": LinearClassifier,
    "ssa": SSAClassifier,
    "cac": CACClassifier,
    "protoseg": ProtoSegClassifier,
    "gmmseg": GMMSegClassifier,
    "dnc": DNCClassifier,
}


def list_models() -> list[str]:
    """Names of networks that have a classifier, and can be trained."""
    return sorted(name for family in FAMILIES.values() for name in family.variants)


def list_mask_models() -> list[str]:
    """Names of mask methods, which predict and are measured, but are not trained here."""
    return sorted(name for family in MASK_FAMILIES.values() for name in family.variants)


def all_families() -> list[Family]:
    """The families of both kinds."""
    return [*FAMILIES.values(), *MASK_FAMILIES.values()]


def family_of(name: str) -> Family:
    """The family of a network or mask method. Raises ValueError for an unknown name."""
    for family in all_families():
        if name in family.variants:
            return family
    raise ValueError(f"model {name!r} is not known\nknown: {', '.join([*list_models(), *list_mask_models()])}")


def build_model(
    name: str,
    num_classes: int,
    classifier: str = "ssa",
    *,
    drop_path: float | None = None,
    dropout: float | None = None,
    group: int = 4,
    loss: LossOptions | None = None,
    options: Mapping[str, Any] | None = None,
    compat: bool = False,
    memory: bool = True,
    channels: int = RGB,
) -> Segmenter:
    """A network in training mode, with random weights, initialised as in the official run without pre-training.

    Args:
        name: one of `list_models()` or `list_mask_models()`.
        num_classes: at least 1.
        classifier: one of `CLASSIFIERS`; of mask methods, `MASKS`.
        drop_path: in [0, 1); None: the network's default rate.
        dropout: in [0, 1): fraction of channels dropped before the classifier; None: the network's default.
        group: number of images over which SSA's teacher takes class means.
        loss: changes of the losses; used in training only.
        options: options of the classifier, see its `OPTIONS`.
        compat: trains as the official code where the network does not do so by default, see `Family.compat`.
        memory: whether the classifier gets its memory of pixels, see `Classifier.MEMORY`; only training needs it.
        channels: of the images; not 3: the layers that read the image are built for them, see `stem.widen`.

    Raises:
        ValueError: an unknown name, a number out of its range, or `compat` for a network that has no such difference;
            a mask method with a classifier, other channels than 3, or an argument that only changes training or a
            classifier (drop_path, dropout, loss, options, compat); or one whose packages are not installed.
    """
    family = family_of(name)
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}, expected at least 1")
    if name in list_mask_models() and classifier == MASKS:
        given = {"drop_path": drop_path, "dropout": dropout, "loss": loss, "options": options or None}
        unused = [key for key, value in given.items() if value is not None] + ["compat"] * compat
        unused += ["channels"] * (channels != RGB)
        if unused:
            raise ValueError(f"{no_training(name)}\nit takes no {', '.join(unused)}: leave this out")
        parts = family.build(name, num_classes, None)
        return MaskSegmenter(parts.backbone, parts.decoder, name, num_classes)
    kind = classifier_of(name, classifier)
    if compat and not family.compat:
        raise ValueError(f"{name} has no use for compat: it already trains as the official code\nset it to false")
    unknown = next((option for option in options or {} if option not in kind.OPTIONS), None)
    if unknown is not None:
        raise ValueError(f"classifier {classifier} has no option {unknown!r}\nknown: {_listed(kind.OPTIONS)}")
    for option, value in (options or {}).items():
        if expected := kind.OPTIONS[option].expected(value):
            raise ValueError(f"option {option} of {classifier} is {value!r}\nexpected {expected}")
    parts = _parts(family, kind, name, num_classes, drop_path)
    if compat:
        parts.decoder.use_compat()
    dropout = family.dropout if dropout is None else dropout
    options = dict(options or {})
    used = options if memory else {**options, **kind.WITHOUT_MEMORY}
    head = kind(parts.decoder.channels, num_classes, dropout, loss, group, **used)
    for buffer in () if memory else kind.MEMORY:
        delattr(head, buffer)
    weights = loss.weights if loss else {}
    known = facts(name, classifier).losses
    wrong = next((term for term in weights if term not in known), None)
    if wrong is not None:
        raise ValueError(f"{name} with {classifier} has no loss {wrong!r}\nknown: {_listed(known)}")
    if loss is not None:
        # The network applies the weights of these losses; hard examples are mined in the main loss only.
        further = replace(loss, weights={}, ohem_threshold=None)
        for module in (parts.decoder, *parts.auxiliary.values()):
            for each in module.modules():
                if isinstance(each, Classifier):
                    each.use_loss(further)
    model = Segmenter(
        *parts[:2], head, parts.auxiliary, name=name, classifier_name=classifier, options=options, weights=weights
    )
    model.channels, model.stems = channels, widen(model.backbone, channels)
    return model


def build_outline(name: str, num_classes: int, classifier: str = "ssa", **given: Any) -> Segmenter:
    """`build_model` with keys and shapes alone, on the meta device: no memory for weights, and little time.

    Raises the same errors.
    """
    with torch.device("meta"), _NoValues():
        return build_model(name, num_classes, classifier, **given)


class _NoValues(TorchFunctionMode):
    """Leaves out all that changes a tensor in place, such as initial values.

    The first random draw or arithmetic on the meta device loads PyTorch's compiler, which takes seconds.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def classifier_of(name: str, classifier: str) -> type[Classifier]:
    """The class of a classifier on network `name`: `linear` is the family's own plain classifier where it has one.

    Raises ValueError for an unknown name, and for a mask method.
    """
    if name in list_mask_models():
        raise ValueError(f"{name} is a mask method: it has no classifier to choose, got {classifier}\nleave it out")
    if classifier not in CLASSIFIERS:
        raise ValueError(f"classifier {classifier!r} is not known\nknown: {_listed(CLASSIFIERS)}")
    kind = CLASSIFIERS[classifier]
    return family_of(name).plain if kind is LinearClassifier else kind


def _parts(family: Family, kind: type[Classifier], name: str, num_classes: int, drop_path: float | None) -> Parts:
    build = family.build_plain if kind is family.plain and family.build_plain else family.build
    return build(name, num_classes, drop_path)


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "none"


class Facts(NamedTuple):
    """What a recipe is checked against: see `ssaseg.recipes.load_recipe`."""

    losses: Mapping[str, Loss]  # by name: the classifier's, auxiliary heads' and first stage's
    options: Mapping[str, Option]
    uses_groups: bool  # whether a micro-batch must consist of whole groups
    compat: str  # what `compat` does; empty: nothing differs, and it is an error


def facts(name: str, classifier: str) -> Facts:
    """Losses, options and groups of a network with a classifier. Raises ValueError for an unknown name, or for a mask
    method.
    """
    if name in list_mask_models():
        raise ValueError(no_training(name))
    kind, family = classifier_of(name, classifier), family_of(name)
    further = {loss: Loss(FURTHER_WEIGHT, meaning) for loss, meaning in family.losses.items()}
    return Facts({**kind.LOSSES, **further}, kind.OPTIONS, kind.uses_groups, family.compat)
