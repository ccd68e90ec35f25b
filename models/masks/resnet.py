"""The backbone of PEM and YOSO, ResNet-50 of stride 32, and names in the files of all mask methods' authors."""

import re
from collections.abc import Sequence
from dataclasses import replace

from ssaseg.models.networks.family import Layout
from ssaseg.models.networks.resnet import DEPTHS, ResNet
from ssaseg.models.rows import Row, several

# mmsegmentation's names, which are the official names here → detectron2's, which the authors' files have.
DETECTRON2 = {
    "conv1": "conv1", "bn1": "conv1.norm", "conv2": "conv2", "bn2": "conv2.norm", "conv3": "conv3",
    "bn3": "conv3.norm", "downsample.0": "shortcut", "downsample.1": "shortcut.norm",
}  # fmt: skip
STEM, BLOCKS = "backbone.", "backbone.layer{+1}.{}."


def resnet50() -> ResNet:
    """ResNet-50 as in torchvision: one 7×7 convolution, maps at strides 4, 8, 16, 32."""
    return ResNet(DEPTHS["r50"], plain=True)


def detectron2(method: str, rows: Sequence[Row], mark: str, last: str, **heads: str) -> Layout:
    """The names in the files of a method's authors.

    rows: of the whole network. mark: the beginning of a key of these files. last: the layer with one row for each class
    and one for "no object", by its name in these files. heads: the names there of `pixel_decoder` and `predictor`.
    """

    def renamed(name: str) -> str:
        if name.startswith(BLOCKS):
            return f"backbone.res{{+2}}.{{}}.{DETECTRON2[name.removeprefix(BLOCKS)]}"
        if name.startswith(STEM):
            return f"backbone.stem.{DETECTRON2[name.removeprefix(STEM)]}"
        first, dot, rest = name.partition(".")
        return f"{heads.get(first, f'sem_seg_head.{first}')}{dot}{rest}"

    head, _, layer = last.rpartition(".")
    return Layout(
        name=f"{method}'s detectron2",
        mark=re.compile(re.escape(mark)),
        rows=[replace(row, theirs=tuple(map(renamed, several(row.theirs)))) for row in rows],
        heads={"classifier": head},
        last=layer,
        left_out={
            "*criterion.empty_weight": "class weights of the training losses",
            **dict.fromkeys(("pixel_mean", "pixel_std"), "the normalisation of images, which the header has"),
        },
    )
