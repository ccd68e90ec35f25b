"""What computes logits: a network in PyTorch, or, in `ssaseg.cli.engine`, a file that another runtime runs."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ssaseg.models import Segmenter
from ssaseg.models.fast import for_inference
from ssaseg.models.masks.base import MaskSegmenter

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Logits(NamedTuple):
    """One view's logits (1,K,·,·) float32 on the device; coarse logits only if the classifier has them."""

    final: Tensor
    coarse: Tensor | None


class Engine(Protocol):
    """Computes logits of images. Several threads may call it at the same time."""

    @property
    def what(self) -> str:
        """Runtime and precision, for people."""

    @property
    def device(self) -> torch.device:
        """Where it takes pixels and returns logits."""

    @property
    def channels(self) -> int:
        """Channels of the images."""

    @property
    def num_classes(self) -> int:
        """Number of classes K."""

    @property
    def has_coarse(self) -> bool:
        """Whether it can give logits before adaptation, too."""

    @property
    def gives_scores(self) -> bool:
        """Whether it gives scores, not logits, see `Classifier.gives_scores`."""

    @property
    def takes(self) -> str:
        """Which pixels: "normalized", float32; or "rgb", uint8, which it normalises itself."""

    def logits(self, pixels: Tensor, coarse: bool = False) -> Logits:
        """Logits (N,K,·,·) of pixels (N,C,h,w), see `takes`; coarse: also those before adaptation, if any."""


@dataclass(frozen=True)
class TorchEngine:
    """A network in PyTorch, in evaluation mode on the device; convolutions and products are of `dtype`."""

    model: Segmenter
    device: torch.device
    dtype: torch.dtype = torch.float32
    exact: bool = True

    @classmethod
    def of(
        cls, model: Segmenter, device: torch.device, dtype: torch.dtype = torch.float32, exact: bool = False
    ) -> "TorchEngine":
        """A folded copy of the model, channels last; `exact`, and for mask methods: the model itself, on the device."""
        exact = exact or isinstance(model, MaskSegmenter)
        network = model.to(device).eval() if exact else for_inference(model.to(device), dtype)
        return cls(network, device, torch.float32 if exact else dtype, exact)

    @property
    def what(self) -> str:
        """For example "torch, folded, float32"."""
        name = next(name for name, dtype in PRECISIONS.items() if dtype == self.dtype)
        return f"torch, {'exact' if self.exact else 'folded'}, {name}"

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.model.channels

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return self.model.num_classes

    @property
    def has_coarse(self) -> bool:
        """Whether the classifier adapts."""
        return self.model.classifier.has_coarse

    @property
    def gives_scores(self) -> bool:
        """See `Classifier.gives_scores`."""
        return self.model.classifier.gives_scores

    @property
    def takes(self) -> str:
        """See `Engine`."""
        return "normalized"

    def logits(self, pixels: Tensor, coarse: bool = False) -> Logits:
        """Logits (N,K,·,·) of normalised pixels float32 (N,C,h,w)."""
        with nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype):
            final, before = self.model.classifier.stages(self.model.feature(pixels))
        return Logits(final.float(), before.float() if coarse and before is not None else None)
