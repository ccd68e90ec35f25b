"""Parts of networks that are as simple as can be."""

from torch import Tensor

from ssaseg.models.decoder import Decoder


class Unchanged(Decoder):
    """A decoder that gives the backbone's only map as the feature."""

    def __init__(self, channels: int, stride: int = 8) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, maps: Tensor) -> Tensor:
        return maps
