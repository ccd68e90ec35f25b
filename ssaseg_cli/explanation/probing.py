"""What a network thinks of an image, classifier by classifier: labels, class probabilities, and adapted prototypes.

The whole image is one input, at the scale of the checkpoint's protocol: SSA adapts to what the network sees, so windows
or mirrored images would be explanations of other prototypes.

Axes: K classes, C channels, h×w feature pixels, H×W pixels of the image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssaseg.cli.errors import CommandError
from ssaseg.cli.scoring.engines import TorchEngine
from ssaseg.cli.scoring.inference import Inference, state_views
from ssaseg.cli.weights.classes import warn_of_untrained
from ssaseg.datasets.colour import normalize
from ssaseg.models import Segmenter, load_model
from ssaseg.models.classifiers.cac import CACClassifier
from ssaseg.models.classifiers.distillation import Adapted
from ssaseg.models.classifiers.ssa import SSAClassifier
from ssaseg.models.labelling import few_classes, label_map, resize_twice
from ssaseg.recipes import parse_protocol

# Of a protocol: what makes one image one input.
ONE_INPUT = {"mode": "whole", "crop": None, "stride": None, "ratios": (1.0,), "flip": False}


@dataclass(frozen=True)
class Stage:
    """What one classifier says about an image. No tensor of K·H·W numbers is made."""

    labels: np.ndarray  # uint8 (H,W)
    logits: Tensor  # (1,K,h,w) float32
    log_sum: Tensor  # (H,W): logarithm of the sum of the exponentials of all logits
    middle: tuple[int, ...]  # size of the network's input

    def logit(self, index: int) -> Tensor:
        """Logit of a class at each pixel (H,W), on the device."""
        return resize_twice(self.logits[:, index : index + 1], self.middle, tuple(self.log_sum.shape))[0, 0]

    def probability(self, index: int) -> np.ndarray:
        """Softmax probability of a class at each pixel, float32 (H,W), in [0, 1]: what is drawn as its activation."""
        return self._probability(self.logit(index))

    def probability_and_strength(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """`probability`, and the strength of a class at each pixel, both float32 (H,W).

        Strength: the logit minus its mean over the image, divided by its deviation; 0 if it is constant. It does not
        change if all logits are multiplied by a number, which makes a classifier surer.
        """
        logit = self.logit(index)
        deviation = logit.std(correction=0)
        varies = deviation > 1e-6 * logit.abs().amax()  # otherwise the deviation is that of float32's rounding
        strength = torch.where(varies, (logit - logit.mean()) / deviation, 0.0)
        return self._probability(logit), strength.cpu().numpy()

    def _probability(self, logit: Tensor) -> np.ndarray:
        return (logit - self.log_sum).exp().cpu().numpy()


class Prototypes(NamedTuple):
    """The prototypes of SSA or CAC in one image."""

    fixed: Tensor  # (K,C) semantic prototypes before adaptation: the weights of the 1×1 convolution
    semantic: Tensor  # (K,C) adapted to the image; of SSA: S'
    similarity: Tensor | None  # (1,K,h,w) cosine of SSA's adapted spatial prototype P' and the spatial feature
    middle: tuple[int, ...]
    size: tuple[int, ...]

    def gaze(self, index: int) -> np.ndarray | None:
        """Cosine of a class's spatial prototype and each pixel's spatial feature, float32 (H,W), in [−1, 1].

        None: there are no spatial prototypes.
        """
        if self.similarity is None:
            return None
        return resize_twice(self.similarity[:, index : index + 1], self.middle, self.size)[0, 0].cpu().numpy()


class Seen(NamedTuple):
    """A network's results for one image."""

    final: Stage
    coarse: Stage | None  # before adaptation; None: the classifier does not adapt
    prototypes: Prototypes | None  # None: none that adapt


@dataclass(frozen=True)
class Probe:
    """A checkpoint in evaluation mode on a device."""

    path: Path
    model: Segmenter
    inference: Inference
    metadata: Mapping[str, Any]
    changed: bool  # whether `eval` would use windows, several scales or mirrored images

    @property
    def classifier(self) -> str:
        """Name of its classifier."""
        return self.model.classifier_name

    @property
    def adapts(self) -> bool:
        """Whether it has logits before adaptation."""
        return self.model.classifier.has_coarse

    @property
    def missing(self) -> list[str]:
        """Kinds of adapted prototypes that it does not have."""
        classifier = self.model.classifier
        found = {"semantic": SSAClassifier | CACClassifier, "spatial": SSAClassifier}
        return [name for name, kinds in found.items() if not isinstance(classifier, kinds)]

    def facts(self) -> dict[str, Any]:
        """For the report: which network it is, and the size of its input."""
        model = self.model
        return {
            "checkpoint": str(self.path),
            "model": model.name,
            "classifier": model.classifier_name,
            "step": self.metadata["step"] if self.metadata["step"] or self.metadata["recipe"] else None,
            "protocol": state_views(self.inference.protocol),
        }

    @torch.inference_mode()
    def look(self, image: np.ndarray, name: str) -> Seen:
        """Results for an image BGR uint8 (H,W,3). Raises DataError if it is too small, FloatingPointError if the logits
        are not finite; both name the image.
        """
        inference, size = self.inference, image.shape[:2]
        (resized,) = inference.inputs(image, name)
        middle = resized.shape[:2]
        pixels = torch.tensor(resized)[None].to(inference.device)
        feature = self.model.feature(normalize(pixels, inference.mean, inference.std))
        classifier = self.model.classifier
        coarse: Tensor | None
        prototypes = None
        if isinstance(classifier, SSAClassifier | CACClassifier):
            adapted = classifier.adapt(feature)
            final, coarse, similarity = adapted.logits, adapted.coarse, None
            if isinstance(adapted, Adapted):
                similarity = cosines(adapted.spatial[0], adapted.spatial_feature[0])[None]
            fixed = classifier.semantic_prototypes.detach()
            prototypes = Prototypes(fixed, adapted.semantic[0], similarity, middle, size)
        else:
            final, coarse = classifier.stages(feature)
        inference.ranges.append(torch.stack(final.aminmax()))
        inference.names.append(name)
        inference.require_finite()
        before = None if coarse is None else make_stage(coarse.float(), middle, size)
        return Seen(make_stage(final.float(), middle, size), before, prototypes)


def open_probe(path: Path, device: torch.device) -> Probe:
    """Reads a checkpoint. Raises CheckpointError, RecipeError for its protocol, and CommandError for a mask method."""
    model, metadata = load_model(path)
    warn_of_untrained(path, metadata)
    if model.classifier.gives_scores:
        raise CommandError(f"{path}: {model.name} is a mask method, without logits and without adaptation to explain")
    whole = parse_protocol(metadata["protocol"], f"{path}: protocol")
    protocol = parse_protocol(whole.model_dump() | ONE_INPUT, f"{path}: protocol")
    inference = Inference(TorchEngine.of(model, device, exact=True), protocol, metadata["mean"], metadata["std"])
    return Probe(path, model, inference, metadata, changed=protocol != whole)


def make_stage(logits: Tensor, middle: tuple[int, ...], size: tuple[int, ...]) -> Stage:
    """Logits (1,K,h,w) → the stage at the image's `size` (H, W), a few classes at a time."""
    labels = label_map(logits, middle, size).cpu().numpy()
    total: Tensor | None = None
    for _, maps in few_classes(logits, middle, size):
        part = maps.logsumexp(dim=0)
        total = part if total is None else torch.logaddexp(total, part)
    assert total is not None
    return Stage(labels, logits, total, middle)


def cosines(prototypes: Tensor, feature: Tensor) -> Tensor:
    """Cosine of each prototype (K,C) and each pixel of a feature (C,h,w) → (K,h,w)."""
    directions = torch.nn.functional.normalize(feature, dim=0)
    return torch.einsum("kc,chw->khw", torch.nn.functional.normalize(prototypes, dim=1), directions)
