"""Parts of a network that are not trained: `optim.freeze`."""

from collections.abc import Collection, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssaseg.models import Segmenter


def frozen(model: Segmenter, what: Collection[str]) -> Iterator[nn.Module]:
    """The modules that `what` names: "backbone", and "norm" for every BatchNorm."""
    if "backbone" in what:
        yield model.backbone
    if "norm" in what:
        yield from (module for module in model.modules() if isinstance(module, _BatchNorm))


def freeze(model: Segmenter, what: Collection[str]) -> None:
    """Takes the gradient from what is not trained; the optimiser and `set_mode` then leave it as it is."""
    for module in frozen(model, what):
        module.requires_grad_(False)


def set_mode(model: Segmenter, what: Collection[str] = ()) -> None:
    """Training mode, but for what is frozen: its statistics stay, and nothing of it is dropped at random."""
    model.train()
    for module in frozen(model, what):
        module.eval()
