"""What every decoder offers a network, and the heads that only training has."""

from typing import Any

from torch import Tensor, nn

from ssaseg.models.classifiers.base import Classifier

# Weight of the losses beside the classifier's own, of auxiliary heads and first stages: mmsegmentation's.
FURTHER_WEIGHT = 0.4


class Decoder(nn.Module):
    """Turns a backbone's maps into the feature (N,C,⌈H/stride⌉,⌈W/stride⌉) that a classifier is given.

    `channels` is C; `stride` [pixels] is how much coarser than the image the feature is, and with it the logits.
    """

    channels: int
    stride: int = 8

    def training_step(self, maps: Any, labels: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """The feature, and unweighted losses by name of a first stage, which a cascade has; here none.

        maps: the backbone's; labels (N,H,W), integers in [0, K) or 255 = ignored.
        """
        return self(maps), {}


class AuxiliaryHead(nn.Module):
    """A decoder and a classifier of its own on the backbone's maps, which training alone has."""

    def __init__(self, decoder: Decoder, classifier: Classifier) -> None:
        super().__init__()
        self.decoder: Decoder = decoder
        self.classifier: Classifier = classifier

    def forward(self, maps: Any, labels: Tensor, name: str) -> dict[str, Tensor]:
        """Unweighted losses of the head that is called `name`: NAME_ce for the classifier's main_ce, and so on."""
        step = self.classifier.training_step(self.decoder(maps), labels)
        return {f"{name}_{loss.removeprefix('main_')}": value for loss, value in step.losses.items()}
