"""Networks for images of other than three channels: the convolutions that read the image get as many inputs.

Stems: the convolutions of a backbone whose input is the image. Most networks have one; ViT-Adapter has two.
"""

import torch
from torch import Tensor, nn

MOST_CHANNELS = 16
RGB = 3


def find_stems(backbone: nn.Module) -> list[str]:
    """Names of the stems of a backbone that was built for RGB: its convolutions of three inputs."""
    return [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Conv2d) and module.in_channels == RGB and module.groups == 1
    ]


def widen(backbone: nn.Module, channels: int) -> list[str]:
    """Gives the stems `channels` inputs, with new random weights of the same spread; with 3, nothing changes, not even
    the state of the random generator. Returns the names of the stems in the network.

    Biases and all other layers keep their values. Raises ValueError for a number that is not from 1 to MOST_CHANNELS.
    """
    if not 1 <= channels <= MOST_CHANNELS:
        raise ValueError(f"channels is {channels}, expected 1 to {MOST_CHANNELS}")
    stems = find_stems(backbone)
    for name in stems if channels != RGB else ():
        conv = backbone.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        outputs, _, *kernel = conv.weight.shape
        drawn = torch.randn(outputs, channels, *kernel, device=conv.weight.device) * conv.weight.detach().std()
        conv.weight = nn.Parameter(drawn.contiguous())
        conv.in_channels = channels
    return [f"backbone.{name}" for name in stems]


def inflate(weight: Tensor, channels: int) -> Tensor:
    """A stem's weight (·,3,·,·) for RGB → (·,channels,·,·), for pre-trained weights.

    More channels: red, green and blue keep their weights, each new channel gets their mean. Fewer: each gets an equal
    share of their sum, so that grey images give the same output as if the grey were repeated in red, green and blue.
    """
    if channels >= RGB:
        mean = weight.mean(dim=1, keepdim=True)
        return torch.cat([weight, mean.expand(-1, channels - RGB, *mean.shape[2:])], dim=1)
    return (weight.sum(dim=1, keepdim=True) / channels).repeat(1, channels, 1, 1)
