"""Image → logits: a backbone, a decoder and a classifier, all built elsewhere and passed in."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssaseg.models.classifiers.base import Classifier, Peers
from ssaseg.models.decoder import FURTHER_WEIGHT, AuxiliaryHead, Decoder


class Segmenter(nn.Module):
    """A network with its classifier, and heads by name that only training has.

    `name`, `classifier_name` and `num_classes` are what it takes to build the same network again. `weights`: of the
    losses that are not the classifier's own, by name, where not FURTHER_WEIGHT; 0 leaves one out.
    """

    def __init__(
        self,
        backbone: nn.Module,
        decoder: Decoder,
        classifier: Classifier,
        auxiliary: Mapping[str, AuxiliaryHead] | None = None,
        *,
        name: str = "",
        classifier_name: str = "",
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.backbone: nn.Module = backbone
        self.decoder: Decoder = decoder
        self.classifier: Classifier = classifier
        self.auxiliary = nn.ModuleDict(dict(auxiliary or {}))
        self.name, self.classifier_name, self.num_classes = name, classifier_name, classifier.num_classes
        self.weights = weights or {}
        self.memories: list[Any] = []

    @property
    def stride(self) -> int:
        """How much coarser than the image the logits are [pixels]."""
        return self.decoder.stride

    def forward(self, images: Tensor, labels: Tensor | None = None, totals: Tensor | None = None) -> Any:
        """Logits (N,K,⌈H/stride⌉,⌈W/stride⌉) of images (N,3,H,W), normalised RGB, H and W at least 32.

        With labels (N,H,W), integers in [0, K) or 255 = ignored: a dict of weighted scalar losses instead, whose sum is
        to be minimised. `totals`: see `Classifier.training_step`.
        """
        if labels is None:
            return self.classifier(self.feature(images))
        maps = self.maps(images)
        feature, further = self.decoder.training_step(maps, labels)
        step = self.classifier.training_step(feature, labels, totals)
        if step.memory is not None:
            self.memories.append(step.memory)
        for name, head in self.auxiliary.items():
            further = further | head(maps, labels, name)
        weights = {name: self.weights.get(name, FURTHER_WEIGHT) for name in further}
        return step.losses | {name: weights[name] * loss for name, loss in further.items() if weights[name]}

    def maps(self, images: Tensor) -> Any:
        """What the backbone makes of images (N,3,H,W)."""
        # Channels last throughout: it suits depthwise convolutions, and the LayerNorms and linear layers between them.
        return self.backbone(images.contiguous(memory_format=torch.channels_last))

    def feature(self, images: Tensor) -> Any:
        """What the decoder makes of images (N,3,H,W) for the classifier: most often (N,C,⌈H/stride⌉,⌈W/stride⌉)."""
        return self.decoder(self.maps(images))

    def update(self, peers: Peers, held: Tensor) -> None:
        """After the optimiser's step: hands the classifier what the micro-batches of the step left; see there."""
        memories, self.memories = self.memories, []
        with torch.no_grad():
            self.classifier.update(memories, peers, held)

    def class_rows(self) -> list[str]:
        """Keys of all tensors that have a row per class, those of auxiliary heads and first stages too."""
        return [
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if isinstance(module, Classifier)
            for name in module.CLASS_ROWS
        ]

    def training_only(self) -> list[str]:
        """Names of the parameters, buffers and modules that inference never reads."""
        own = [f"classifier.{name}" for name in self.classifier.training_only()]
        return own + ["auxiliary"] * bool(self.auxiliary)

    def drop_training_only(self) -> None:
        """Removes what inference never reads, such as SSA's teacher branch; the network can't be trained any more."""
        for name in self.training_only():
            owner, _, last = name.rpartition(".")
            if hasattr(self.get_submodule(owner), last):  # else it was dropped before
                delattr(self.get_submodule(owner), last)
        self.auxiliary = nn.ModuleDict()


def is_below(key: str, names: list[str]) -> bool:
    """Whether a state dict's key is one of the names, or lies below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)
