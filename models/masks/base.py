"""Mask methods: a network predicts masks, each with a distribution over the classes, and no logits of pixels.

They are here for inference and measuring. Scores are computed as in MaskFormer's code for semantic segmentation: the
score of a class is the sum over the masks of P(class of the mask) · P(pixel in the mask).

Source: "Per-Pixel Classification is Not All You Need" (Cheng et al., arXiv 2107.06278).

Axes: N images, Q masks (queries), K classes, H×W pixels of the image; the networks compute on images padded to
multiples of 32.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssaseg.models.classifiers.base import Classifier, Loss
from ssaseg.models.decoder import Decoder
from ssaseg.models.layers import resize_bilinear
from ssaseg.models.segmenter import Segmenter

MASKS = "masks"  # stands in the place of a classifier's name in checkpoints
DIVISOR = 32  # sides of the padded image are multiples of it
QUERIES = 100


class Masks(NamedTuple):
    """The result of a mask method's decoder."""

    classes: Tensor  # logits (N,Q,K+1); the last one: no object
    masks: Tensor  # logits (N,Q,h,w), at stride 4 of the padded image
    size: tuple[int, int] = (0, 0)  # (H, W)


class MaskDecoder(Decoder):
    """Turns the maps of a ResNet (strides 4, 8, 16, 32) into `Masks`, whose `size` the network adds."""

    channels, stride = 0, 1


class MaskScores(Classifier):
    """In the place of a classifier: has no weights and returns scores, not logits."""

    LOSSES: ClassVar[dict[str, Loss]] = {}
    gives_scores: ClassVar[bool] = True

    def forward(self, feature: Masks) -> Tensor:
        """Scores (N,K,H,W), from 0 to Q; of a pixel they need not sum to 1. There is no class for "no object"."""
        classes, masks, (height, width) = feature
        padded = (height + -height % DIVISOR, width + -width % DIVISOR)
        masks = resize_bilinear(masks, padded)[..., :height, :width].sigmoid()
        return torch.einsum("nqk,nqhw->nkhw", classes.softmax(dim=2)[..., :-1], masks)


class MaskSegmenter(Segmenter):
    """A mask method as a network like any other, except that it can't be trained here.

    `forward` and the classifier return scores at the size of the image, K·H·W numbers: 157 MB for 150 classes and
    512×512 pixels.
    """

    def __init__(self, backbone: torch.nn.Module, decoder: Decoder, name: str, num_classes: int) -> None:
        super().__init__(backbone, decoder, MaskScores(0, num_classes), name=name, classifier_name=MASKS)

    def forward(self, images: Tensor, labels: Tensor | None = None, totals: Tensor | None = None) -> Tensor:
        """Scores (N,K,H,W) of images (N,3,H,W), normalised RGB. Raises ValueError if there are labels."""
        if labels is not None:
            raise ValueError(no_training(self.name))
        return self.classifier(self.feature(images))

    def feature(self, images: Tensor) -> Masks:
        """Masks of images (N,3,H,W), which are padded with zeros at the right and at the bottom."""
        height, width = images.shape[2:]
        padded = F.pad(images, (0, -width % DIVISOR, 0, -height % DIVISOR))
        return self.decoder(self.maps(padded))._replace(size=(height, width))


def no_training(name: str) -> str:
    """Why a mask method is refused in training."""
    return f"{name} is a mask method, which ssaseg does not train: it predicts with official weights, and is measured"
