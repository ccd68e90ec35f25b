"""The second part of `ssaseg profile --paper-table`: mask methods beside networks with SSA, in one counting for all.

The paper (SSA-Seg, arXiv 2405.06525) compares mask methods, whose figures count matrix products and post-processing,
with networks with SSA, whose figures count modules only. So the published figures of the two cannot be compared.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ssaseg.cli.console import print_table
from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.profiling.counting import EVERY_OPERATION, count
from ssaseg.cli.profiling.latency import measure_latency
from ssaseg.cli.profiling.targets import mask_model
from ssaseg.cli.scoring.engines import TorchEngine


class Figures(NamedTuple):
    """What is known of a mask method with ResNet-50, 150 classes, 512×512."""

    parameters: float  # [M], in its paper
    gmacs: float  # in its paper, which calls them GFLOPs
    counted: float  # GMACs of the official code, measured with fvcore 0.1.5 as the papers do


KNOWN = {
    "maskformer_r50": Figures(41.3, 55.1, 54.97),
    "mask2former_r50": Figures(44.0, 70.1, 70.20),
    "yoso_r50": Figures(42.0, 37.3, 37.24),
    "pem_r50": Figures(35.6, 46.9, 33.85),
}
REMARKS = (
    "GMACs, every operation: of mask methods with the product of masks and classes; only this column compares all rows",
    "published: of mask methods by fvcore, with that product, but without compiled operations (deformable convolution "
    "and deformable attention); of networks with SSA, modules only. Official code: counted again with fvcore 0.1.5",
    "pem_r50: its published 46.9 GMACs are not reproduced: its official code has 33.9 in the papers' counting",
    "maskformer_r50: ours leaves out the masks of the first five layers, which the official code computes and discards",
    "latency: deformable operations are plain PyTorch here (with torchvision, its operator), slower than CUDA kernels",
)


def measure_masks(image: Tensor, runs: int) -> list[dict[str, Any]]:
    """The rows of all mask methods whose package is installed; `image` is on the device. Reports the others."""
    rows = []
    for name, figures in KNOWN.items():
        try:
            model = mask_model(name)
        except CommandError as error:
            first, _, fix = str(error).partition("\n")
            echo(f"not measured: {first}; {fix}", err=True)
            continue
        echo(f"{name} is measured", err=True)
        counts = count(model, image)
        (timings,) = measure_latency([TorchEngine.of(model, image.device)], image, runs)
        rows.append(describe(name, counts, figures) | timings)
    return rows


def describe(name: str, counts: dict[str, Any], figures: Figures) -> dict[str, Any]:
    """A row without timings: what `counting.count` found, beside what is known."""
    return {
        "model": name,
        "classifier": "masks",
        "parameters": counts["parameters"] / 1e6,
        "gmacs": counts["gmacs"],
        "official_gmacs": figures.counted,
        "paper": {"parameters": figures.parameters, "gmacs": figures.gmacs, "latency": None},
    }


def print_masks(masks: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], title: str) -> None:
    """Prints the mask methods, and below them the networks with SSA among `others`, on stdout."""
    columns = (
        "",
        "parameters [M]",
        "paper",
        "GMACs, every operation",
        "official code, by fvcore",
        "paper",
        "network and labels p50 [ms]",
    )
    rows = [_cells(row) for row in (*masks, *(row for row in others if row["classifier"] == "ssa"))]
    print_table(columns, rows, f"mask methods and networks with SSA: {title}")
    for remark in REMARKS:
        echo(remark)


def _cells(row: dict[str, Any]) -> Sequence[str]:
    return (
        f"{row['model']} {row['classifier']}",
        f"{row['parameters']:.2f}",
        _figure(row["paper"]["parameters"]),
        f"{row['gmacs'][EVERY_OPERATION]:.2f}",
        _figure(row.get("official_gmacs"), 2),
        _figure(row["paper"]["gmacs"]),
        f"{row['network_ms']['p50'] + row['post_ms']['p50']:.1f}",
    )


def _figure(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
