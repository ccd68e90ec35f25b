"""Image → logits: a backbone, a decoder and a classifier, all built elsewhere and passed in."""

from typing import Any

import torch
from torch import Tensor, nn

from ssaseg.models.classifiers.base import Classifier


class Segmenter(nn.Module):
    """A network with its classifier.

    `name`, `classifier_name` and `num_classes` are what it takes to build the same network again.
    """

    def __init__(
        self, backbone: nn.Module, decoder: nn.Module, classifier: Classifier, name: str, classifier_name: str
    ) -> None:
        super().__init__()
        self.backbone: nn.Module = backbone
        self.decoder: nn.Module = decoder
        self.classifier: Classifier = classifier
        self.name, self.classifier_name, self.num_classes = name, classifier_name, classifier.num_classes
        self.memories: list[Any] = []

    def forward(self, images: Tensor, labels: Tensor | None = None, pairs: Tensor | None = None) -> Any:
        """Logits (N,K,⌈H/8⌉,⌈W/8⌉) of images (N,3,H,W), normalised RGB, H and W at least 32; float32 with `ssa`.

        With labels (N,H,W), integers in [0, K) or 255 = ignored: a dict of weighted scalar losses instead, whose sum is
        to be minimised. `pairs`: see `Classifier.training_step`.
        """
        feature = self.feature(images)
        if labels is None:
            return self.classifier(feature)
        step = self.classifier.training_step(feature, labels, pairs)
        if step.memory is not None:
            self.memories.append(step.memory)
        return step.losses

    def feature(self, images: Tensor) -> Any:
        """What the decoder makes of images (N,3,H,W) for the classifier: most often (N,C,⌈H/8⌉,⌈W/8⌉)."""
        # Channels last throughout: it suits depthwise convolutions, and the LayerNorms and linear layers between them.
        return self.decoder(self.backbone(images.contiguous(memory_format=torch.channels_last)))

    def drop_training_only(self) -> None:
        """Removes what inference never reads, such as SSA's teacher branch; the network can't be trained any more."""
        for prefix in self.classifier.training_only():
            owner, _, name = prefix.rstrip(".").rpartition(".")
            self.classifier.get_submodule(owner)._modules.pop(name, None)

    def update(self) -> None:
        """After the optimiser's step: hands the classifier what the micro-batches of the step left for it."""
        self.classifier.update(self.memories)
        self.memories = []
