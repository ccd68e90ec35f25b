"""Networks for tests whose point is not the network."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from ssaseg.cli.weights import huggingface
from ssaseg.models.networks import (
    afformer,
    cgrseg,
    efficientformer,
    seaformer,
    segformer_nvidia,
    segnext,
    swin,
    upernet,
)

# A network of each family with every part and next to no blocks: an export's time goes with their number.
TINY: dict[str, tuple[Any, Any]] = {
    "afformer_x": (afformer, afformer.Variant(widths=(16, 16, 24, 24), depths=(1, 1, 1, 1), channels=32)),
    "cgrseg_x": (cgrseg, cgrseg.Variant(backbone="x", channels=32, context=1, band=3)),
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
    "segnext_x": (segnext, segnext.Variant(widths=(8, 8, 16, 16), depths=(0, 0, 0, 1), channels=32, bases=4)),
}


@contextmanager
def tiny_networks() -> Iterator[None]:
    """Makes `build_model` know the names of `TINY`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, (module, variant) in TINY.items():
            patch.setitem(module.VARIANTS, name, variant)
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
