"""Networks by name.

>>> model = build_model("seaformer_t", num_classes=8)
>>> logits = model(torch.randn(1, 3, 64, 64))  # (1, 8, 8, 8)
"""

from collections.abc import Callable, Mapping
from typing import Any

from ssaseg.models.classifiers.base import Classifier, Distillation, LossOptions
from ssaseg.models.classifiers.linear import LinearClassifier
from ssaseg.models.classifiers.ssa import SSAClassifier
from ssaseg.models.networks import afformer, cgrseg, seaformer, segnext
from ssaseg.models.segmenter import Segmenter

# Name → function (name, drop_path) → (backbone, decoder). A decoder tells its output's `channels`.
NETWORKS: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(afformer.VARIANTS, afformer.build),
    **dict.fromkeys(cgrseg.VARIANTS, cgrseg.build),
    **dict.fromkeys(seaformer.VARIANTS, seaformer.build),
    **dict.fromkeys(segnext.VARIANTS, segnext.build),
}

# Networks whose paper's plain classifier is more than a 1×1 convolution: what stands for `linear` there.
GUIDED = dict.fromkeys(cgrseg.VARIANTS, (cgrseg.build_guided, cgrseg.GuidedClassifier))


def list_models() -> list[str]:
    """Names that `build_model` takes."""
    return sorted(NETWORKS)


def build_model(
    name: str,
    num_classes: int,
    classifier: str = "ssa",
    *,
    drop_path: float | None = None,
    dropout: float = 0.1,
    distillation: Distillation | None = None,
    loss: LossOptions | None = None,
) -> Segmenter:
    """A network with fresh weights, initialised as its official run starts without pre-training; in training mode.

    `drop_path` in [0, 1): None takes the network's own rate. `dropout` in [0, 1): channels dropped before the
    classifier. `loss` is of training alone. Raises ValueError for an unknown name or a number that makes no sense.
    """
    if name not in NETWORKS:
        raise ValueError(f"model {name!r} is not known\nknown: {', '.join(list_models())}")
    if classifier not in CLASSIFIERS:
        raise ValueError(f"classifier {classifier!r} is not known\nknown: {', '.join(CLASSIFIERS)}")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}, expected at least 1")
    build, kind = NETWORKS[name], CLASSIFIERS[classifier]
    if classifier == "linear" and name in GUIDED:
        build, kind = GUIDED[name]
    backbone, decoder = build(name, drop_path)
    head = kind(decoder.channels, num_classes, dropout, distillation or Distillation(), loss)
    return Segmenter(backbone, decoder, head, name, classifier)


CLASSIFIERS: Mapping[str, type[Classifier]] = {"linear": LinearClassifier, "ssa": SSAClassifier}
