"""The network: image → backbone → decoder → classifier → logits. The parts are built elsewhere and passed in."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssaseg.models.classifiers.base import Classifier, Peers
from ssaseg.models.decoder import FURTHER_WEIGHT, AuxiliaryHead, Decoder


class Segmenter(nn.Module):
    """A network with its classifier, and auxiliary heads by name, which are used in training only.

    `name`, `classifier_name`, its `options`, `num_classes` and `channels` are enough to build the same network again.
    `weights`: weights of the losses of auxiliary heads and of a first stage, by name; the default is FURTHER_WEIGHT,
    and 0 leaves a loss out. Where images are (N,3,H,W) below, 3 stands for `channels`.
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
        options: Mapping[str, Any] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.backbone: nn.Module = backbone
        self.decoder: Decoder = decoder
        self.classifier: Classifier = classifier
        self.auxiliary = nn.ModuleDict(dict(auxiliary or {}))
        self.name, self.classifier_name, self.num_classes = name, classifier_name, classifier.num_classes
        self.options = dict(options or {})
        self.weights = weights or {}
        self.memories: list[Any] = []
        self.channels = 3  # of the images; if there are 3 or more, the first are red, green and blue
        self.stems: list[str] = []  # names of the layers that read them

    @property
    def stride(self) -> int:
        """Distance between two positions of the logits [pixels of the image]."""
        return self.decoder.stride

    def forward(self, images: Tensor, labels: Tensor | None = None, totals: Tensor | None = None) -> Any:
        """Logits (N,K,⌈H/stride⌉,⌈W/stride⌉) of images (N,3,H,W), normalised RGB, H and W at least 32.

        With labels (N,H,W), integers in [0, K) or 255 = ignored, it returns a dict of weighted scalar losses instead;
        training minimises their sum. `totals`: see `Classifier.training_step`.
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
        """The backbone's output for images (N,3,H,W)."""
        # Channels last everywhere: faster for depthwise convolutions, and for LayerNorms and linear layers.
        return self.backbone(images.contiguous(memory_format=torch.channels_last))

    def feature(self, images: Tensor) -> Any:
        """The classifier's input for images (N,3,H,W): in most networks (N,C,⌈H/stride⌉,⌈W/stride⌉)."""
        return self.decoder(self.maps(images))

    def update(self, peers: Peers, held: Tensor) -> None:
        """After the optimiser's step: passes the memories of its micro-batches to `Classifier.update`."""
        memories, self.memories = self.memories, []
        with torch.no_grad():
            self.classifier.update(memories, peers, held)

    def class_rows(self) -> list[str]:
        """Keys of all tensors that have one row per class, also in auxiliary heads and a first stage."""
        return [
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if isinstance(module, Classifier)
            for name in module.CLASS_ROWS
            if hasattr(module, name.partition(".")[0])  # else without memory
        ]

    def memory(self) -> list[str]:
        """Names of the classifier's memory of pixels, which checkpoints leave out."""
        return [f"classifier.{name}" for name in self.classifier.MEMORY]

    def copied(self) -> "Segmenter":
        """A copy for inference, or to try a step: the memory of pixels, which may have gigabytes, is not copied."""
        memory = self.memory()
        shared = [value for key, value in self.state_dict(keep_vars=True).items() if is_below(key, memory)]
        return copy.deepcopy(self, {id(value): value for value in shared})

    def training_only(self) -> list[str]:
        """Names of the parameters, buffers and modules that inference never reads."""
        own = [f"classifier.{name}" for name in self.classifier.training_only()]
        return own + ["auxiliary"] * bool(self.auxiliary)

    def drop_training_only(self) -> None:
        """Removes what inference never reads, such as SSA's teacher branch; then the network can't be trained."""
        for name in self.training_only():
            owner, _, last = name.rpartition(".")
            if hasattr(self.get_submodule(owner), last):  # else already removed
                delattr(self.get_submodule(owner), last)
        self.auxiliary = nn.ModuleDict()


def is_below(key: str, names: list[str]) -> bool:
    """Whether a key of a state dict is one of the names, or lies below one of them."""
    return any(key == name or key.startswith(f"{name}.") for name in names)
