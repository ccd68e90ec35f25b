"""The base class of decoders, and the auxiliary heads of training."""

from typing import Any

from torch import Tensor, nn

from ssaseg.models.classifiers.base import Classifier

# Default weight of the losses of auxiliary heads and first stages, as in mmsegmentation.
FURTHER_WEIGHT = 0.4


class Decoder(nn.Module):
    """Turns a backbone's maps into the classifier's input: the feature (N,C,⌈H/stride⌉,⌈W/stride⌉).

    `channels` is C. `stride` [pixels of the image] is the distance between positions of the feature and of the logits.
    """

    channels: int
    stride: int = 8

    def training_step(self, maps: Any, labels: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """The feature, and the unweighted losses of a first stage by name. By default there is no first stage.

        A cascade overrides this. maps: the backbone's; labels (N,H,W): integers in [0, K) or 255 = ignored.
        """
        return self(maps), {}

    def use_compat(self) -> None:
        """From now on, training does what `Family.compat` says. Only decoders of families that have it override this.

        Inference does not change.
        """
        raise NotImplementedError


class AuxiliaryHead(nn.Module):
    """A second decoder and classifier on the backbone's maps, for training only."""

    def __init__(self, decoder: Decoder, classifier: Classifier) -> None:
        super().__init__()
        self.decoder: Decoder = decoder
        self.classifier: Classifier = classifier

    def forward(self, maps: Any, labels: Tensor, name: str) -> dict[str, Tensor]:
        """The head's unweighted losses. They are named after `name`: the classifier's main_ce becomes NAME_ce."""
        step = self.classifier.training_step(self.decoder(maps), labels)
        return {f"{name}_{loss.removeprefix('main_')}": value for loss, value in step.losses.items()}
