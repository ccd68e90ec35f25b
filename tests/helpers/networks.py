"""Networks for tests whose point is not the network."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from torch import Tensor, nn

from ssaseg.cli.weights import huggingface
from ssaseg.models.build import FAMILIES
from ssaseg.models.decoder import Decoder
from ssaseg.models.networks import (
    afformer,
    cgrseg,
    efficientformer,
    fcn,
    hrnet,
    lite0,
    ocrnet,
    resnet,
    seaformer,
    segformer,
    segformer_nvidia,
    segnext,
    swin,
    upernet,
    vit_adapter,
)
from ssaseg.models.networks.family import Parts

# A network of each family with every part and next to no blocks: an export's time goes with their number.
TINY: dict[str, tuple[Any, Any]] = {
    "afformer_x": (afformer, afformer.Variant(widths=(16, 16, 24, 24), depths=(1, 1, 1, 1), channels=32)),
    "cgrseg_x": (cgrseg, cgrseg.Variant(backbone="x", channels=32, context=1, band=3)),
    "lite0_x": (
        lite0,
        lite0.Variant(
            stem=8,
            stages=((1, 3, 1, 8, 1), (1, 3, 2, 8, 2), (1, 5, 2, 16, 2), (2, 3, 2, 16, 2)),
            maps=(1, 2, 3),
            fuse=(16, 16),
        ),
    ),
    "segformer_nvidia_x": (segformer_nvidia, segformer_nvidia.Variant(base=8, depths=(1, 1, 1, 1), channels=16)),
    "seaformer_x": (
        seaformer,
        seaformer.Variant(
            stem=8,
            mobile=tuple(((3, 1, width, 2),) for width in (8, 16, 24, 32, 40)),
            depths=(1,),
            key_dims=(8,),
            heads=2,
            mlp_ratios=(2,),
            fuse=(24,),
        ),
    ),
    # For runs: the drop path of a single block would be 0.
    "seaformer_z": (
        seaformer,
        seaformer.Variant(
            stem=8,
            mobile=tuple(((3, 1, width, 2),) for width in (8, 16, 24, 32, 40)),
            depths=(2,),
            key_dims=(8,),
            heads=2,
            mlp_ratios=(2,),
            fuse=(24,),
        ),
    ),
    # Without attention, which takes most of the time to trace.
    "seaformer_y": (
        seaformer,
        seaformer.Variant(
            stem=8,
            mobile=tuple(((3, 1, width, 2),) for width in (8, 16, 24, 32, 40)),
            depths=(0,),
            key_dims=(8,),
            heads=2,
            mlp_ratios=(2,),
            fuse=(24,),
        ),
    ),
    "segformer_x": (segformer, segformer.Variant(base=8, depths=(1, 1, 1, 1))),
    "segnext_x": (segnext, segnext.Variant(widths=(8, 8, 16, 16), depths=(0, 0, 0, 1), channels=32, bases=4)),
}


def _fcn(classes: int, drop_path: float | None) -> Parts:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "PLANES", (4, 4, 8, 8))
        backbone = resnet.ResNet((1, 1, 2, 2))
    decoder = fcn.FCNDecoder(backbone.channels[3], 16, convs=2, level=3, stride=8, concat=True)
    return Parts(backbone, decoder, {"aux": fcn.auxiliary_head(backbone.channels[2], 2, 8, classes)})


def _ocrnet(classes: int, drop_path: float | None) -> Parts:
    with pytest.MonkeyPatch.context() as patch:
        for constant, value in {"MODULES": (1, 1, 1), "BLOCKS": 1, "STEM": 8}.items():
            patch.setattr(hrnet, constant, value)
        backbone = hrnet.HRNet((4, 8, 8, 16))
    return Parts(backbone, ocrnet.OCRDecoder(backbone.channels, classes, channels=16, inner=8))


def _upernet(backbone: Any, classes: int) -> Parts:
    head = fcn.auxiliary_head(backbone.channels[2], 2, 16, classes)
    return Parts(backbone, upernet.UPerDecoder(backbone.channels, channels=16), {"aux": head})


SWIN = swin.Variant(width=8, depths=(2, 1, 1, 1), heads=(1, 2, 2, 4))
ADAPTER = vit_adapter.Variant(
    width=16, depth=4, heads=2, deformable_heads=4, value_share=0.5, drop_path=0.1, positions=4
)
# Those whose variants do not say all widths: name → family, and what builds its parts.
BUILT: dict[str, tuple[str, Callable[[int, float | None], Parts]]] = {
    "fcn_x": ("fcn", _fcn),
    "ocrnet_x": ("ocrnet", _ocrnet),
    "upernet_swin_x": ("upernet", lambda classes, drop_path: _upernet(swin.Swin(SWIN, drop_path), classes)),
    "upernet_vit_adapter_x": (
        "vit_adapter",
        lambda classes, drop_path: _upernet(vit_adapter.ViTAdapter(ADAPTER, drop_path), classes),
    ),
}


class Flat(Decoder):
    """Gives the maps as they are."""

    channels = 8

    def forward(self, maps: Tensor) -> Tensor:
        return maps


@contextmanager
def flat_network() -> Iterator[None]:
    """Makes `build_model` know flat_x, one convolution and a classifier: the quickest network to export."""
    family = FAMILIES["fcn"]

    def build(name: str, classes: int, drop_path: float | None = None) -> Parts:
        return Parts(nn.Conv2d(3, 8, 8, stride=8), Flat())

    with pytest.MonkeyPatch.context() as patch:
        flat = replace(family, variants={**family.variants, "flat_x": None}, build=build)
        patch.setitem(FAMILIES, "fcn", flat)  # type: ignore[arg-type]
        yield


@contextmanager
def tiny_networks() -> Iterator[None]:
    """Makes `build_model` know the names of `TINY` and `BUILT`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, (module, variant) in TINY.items():
            patch.setitem(module.VARIANTS, name, variant)
        for name, (key, build) in BUILT.items():
            family = FAMILIES[key]
            patch.setitem(
                FAMILIES,  # type: ignore[arg-type]
                key,
                replace(
                    family,
                    variants={**family.variants, name: None},
                    build=lambda known, classes, drop_path=None, name=name, build=build, family=family: (
                        build(classes, drop_path) if known == name else family.build(known, classes, drop_path)
                    ),
                ),
            )
        grid = efficientformer.Variant(widths=(8, 8, 16, 16), expansions=((), (), (2,), ()), attention=1, drop_path=0.0)
        patch.setitem(efficientformer.VARIANTS, "x", grid)
        yield


@contextmanager
def tiny_swin() -> Iterator[None]:
    """Makes `build_model` know upernet_swin_x, which has every part of UPerNet with Swin."""
    with pytest.MonkeyPatch.context() as patch:
        variant = swin.Variant(width=24, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8))
        patch.setattr(upernet, "UPerDecoder", partial(upernet.UPerDecoder, channels=32))
        patch.setitem(huggingface.UPERNET, "hidden_size", 32)
        patch.setitem(swin.VARIANTS, "x", variant)
        patch.setitem(upernet.VARIANTS, "upernet_swin_x", variant)
        yield
