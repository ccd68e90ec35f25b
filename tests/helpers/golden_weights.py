"""The weights and inputs that the figures of the official code were computed with: see `golden/README.md`."""

import math
import re
import zlib
from collections.abc import Callable

import numpy as np
import torch
from places import GOLDEN
from torch import Tensor, nn

from ssaseg.models import Segmenter, build_model
from ssaseg.models.layers import DropPath
from ssaseg.models.masks.base import MASKS
from ssaseg.models.official import official_entries, official_keys

INPUTS = {
    "logits_512": (1234, 1.0, (512, 512)),
    "logits_480x640": (1235, 1.0, (480, 640)),
    "logits_512_amp80": (1236, 80.0, (512, 512)),
}


def weight(key: str, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
    """The value that the figures were computed with: a draw seeded by the official key, scaled by its role."""
    if not kind.is_floating_point:
        return torch.zeros(shape, dtype=kind)
    # AFFormer's encoders list the modules that their blocks share under each block's name too.
    key = re.sub(r"MHCA_layers\.\d+\.(?:factoratt_crpe\.)?(cpe|crpe)\.", r"\1.", key)
    seeded = torch.Generator().manual_seed(zlib.crc32(key.encode()) & 0x7FFFFFFF)
    if key.endswith("running_var"):
        return torch.rand(shape, generator=seeded) + 0.5
    draw = torch.randn(shape, generator=seeded)
    if key.endswith("running_mean"):
        return draw * 0.1
    if "layer_scale" in key or "gamma" in key:
        return draw * 0.01 + 0.05
    if "pos_embed" in key or "attention_biases" in key:
        return draw
    if len(shape) <= 1:
        return draw * 0.1 + 0.8 if key.endswith("weight") else draw * 0.05
    return draw * math.sqrt(1 / math.prod(shape[1:]))


def filled(name: str, classifier: str, make: Callable[..., Tensor] = weight) -> Segmenter:
    """A network with the figures' weights, in evaluation mode."""
    model = build_model(name, 150, classifier)
    state = model.state_dict()
    values = {
        ours: make(key, tuple(state[ours].shape), state[ours].dtype) for ours, key in official_keys(model).items()
    }
    model.load_state_dict(values)
    if name.startswith("segnext"):
        model.decoder.bases_seed = 7
    return model.eval()


def losses_on_stored_input(model: Segmenter, size: int) -> dict[str, float]:
    """All losses on two images of `size`² pixels; their gradients are then in the parameters.

    In training mode, but BatchNorm in evaluation mode, and nothing is dropped.
    """
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(4321))
    labels = torch.from_numpy(np.load(GOLDEN / "labels.npz")[f"labels_{size}"]).long()
    for module in model.modules():
        module.training = not isinstance(module, nn.BatchNorm2d | nn.Dropout2d | DropPath)
    model.zero_grad()
    losses = model(images, labels)
    sum(losses.values()).backward()
    model.eval()
    return {name: value.item() for name, value in losses.items()}


def filled_masks(name: str) -> Segmenter:
    """A mask method with the figures' weights, in evaluation mode."""
    model = build_model(name, 150, MASKS)
    state, values = model.state_dict(), {}
    for entry in official_entries(model):
        theirs = {key: (tuple(value.shape), value.dtype) for key, value in entry.give(state).items()}
        values |= entry.take({key: weight(key, *each) for key, each in theirs.items()})
    model.load_state_dict(values)
    return model.eval()
