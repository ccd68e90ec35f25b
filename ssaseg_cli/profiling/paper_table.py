"""`ssaseg profile --paper-table`: what our networks cost, linear and ssa, beside the paper's figures.

The paper: SSA-Seg (NeurIPS 2024, arXiv 2405.06525), the table of its lightweight models, for 150 classes at 512×512.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ssaseg.cli.console import json_target, print_table, write_json
from ssaseg.cli.device import select_device
from ssaseg.cli.printing import echo
from ssaseg.cli.profiling.profile import (
    CLASSES,
    COUNTINGS,
    EVERY_OPERATION,
    MODULES_ONLY,
    conditions,
    count,
    measure_latency,
)
from ssaseg.models import build_model

SIZE = (512, 512)


class Published(NamedTuple):
    """A row of the paper's table."""

    parameters: float  # [M]
    gmacs: float  # [GMACs], which the paper calls GFLOPs
    latency: float  # [ms], on the authors' GPU


PAPER: dict[str, dict[str, Published]] = {
    "afformer_b": {"linear": Published(3.0, 4.3, 25.1), "ssa": Published(3.3, 4.4, 26.0)},
    "seaformer_b": {"linear": Published(8.6, 1.8, 26.8), "ssa": Published(8.8, 1.8, 27.3)},
    "segnext_t": {"linear": Published(4.3, 6.2, 22.8), "ssa": Published(4.6, 6.3, 23.3)},
    "seaformer_l": {"linear": Published(14.0, 6.4, 29.4), "ssa": Published(14.2, 6.4, 29.9)},
    "cgrseg_b": {"linear": Published(19.1, 7.7, 36.0), "ssa": Published(19.3, 7.6, 36.0)},
    "cgrseg_l": {"linear": Published(35.7, 14.9, 43.3), "ssa": Published(35.8, 14.8, 42.6)},
}

# Parameters that the official models have but never use. The paper counts them.
NEVER_USED = {"afformer_b": 66_048}


def run_paper_table(json_out: str | None, device: str, runs: int) -> int:
    """Measures all networks of the paper's table and prints the table. Returns 0.

    The networks take turns. json_out: a file; "-": stdout, without the table; or None. runs: timed passes of each
    network.
    """
    chosen = select_device(device)
    json_out = json_target(json_out)
    image = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0)).to(chosen)
    pairs = [(name, classifier) for name, kinds in PAPER.items() for classifier in kinds]
    models = [build_model(name, CLASSES, classifier).eval().requires_grad_(False) for name, classifier in pairs]
    rows = [
        describe(name, classifier, count(model, image)) for (name, classifier), model in zip(pairs, models, strict=True)
    ]
    for row, timings in zip(rows, measure_latency([model.to(chosen) for model in models], image, runs), strict=True):
        row.update(timings)
    report = {
        "classes": CLASSES,
        "size": list(SIZE),
        **conditions(chosen, runs),
        "rows": rows,
    }
    write_json(json_out, report)  # before printing, which may fail
    if json_out != "-":
        print_paper_table(report)
    return 0


def describe(name: str, classifier: str, counts: dict[str, Any]) -> dict[str, Any]:
    """A row without timings: what `profile.count` found for a network, beside the paper's figures.

    `parameters` [M]: without the training-only ones, and with those that the official model has but never uses.
    """
    parameters = (counts["parameters_deployed"] + NEVER_USED.get(name, 0)) / 1e6
    paper = PAPER[name][classifier]
    return {
        "model": name,
        "classifier": classifier,
        "parameters": parameters,
        "never_used": NEVER_USED.get(name, 0),
        "gmacs": counts["gmacs"],
        "paper": paper._asdict(),
        "deviation_percent": {
            "parameters": 100 * (parameters / paper.parameters - 1),
            "gmacs": 100 * (counts["gmacs"][MODULES_ONLY] / paper.gmacs - 1),
        },
    }


def print_paper_table(report: dict[str, Any]) -> None:
    """Prints the rows on stdout, with the conditions under which they were measured."""
    columns = (
        "",
        "parameters [M]",
        "paper",
        "GMACs, every operation",
        "modules only",
        "paper",
        "network p50 [ms]",
        "and labels",
        "paper",
    )
    print_table(columns, [_cells(row) for row in report["rows"]], _title(report))
    echo("parameters: without those that only training uses; in percent: our deviation from the paper")
    for name, unused in NEVER_USED.items():
        echo(f"{name}: as in the paper, with {unused:,} parameters that the official model has but never uses")
    for name, meaning in COUNTINGS.items():
        echo(f"{name}: {meaning}")
    conditions = f"{report['device']}, {report['threads']} CPU threads, torch {report['torch']}"
    echo(
        f"latency: {conditions}; {report['runs']} timed passes each, in turn; the paper's latency: on its authors' GPU"
    )


def _title(report: dict[str, Any]) -> str:
    height, width = report["size"]
    return f"{report['classes']} classes, {height}x{width}, float32, batch 1"


def _cells(row: dict[str, Any]) -> Sequence[str]:
    paper, deviation = row["paper"], row["deviation_percent"]
    network, labels = row["network_ms"]["p50"], row["post_ms"]["p50"]
    return (
        f"{row['model']} {row['classifier']}",
        f"{row['parameters']:.3f} ({deviation['parameters']:+.1f} %)",
        f"{paper['parameters']:.1f}",
        f"{row['gmacs'][EVERY_OPERATION]:.3f}",
        f"{row['gmacs'][MODULES_ONLY]:.3f} ({deviation['gmacs']:+.1f} %)",
        f"{paper['gmacs']:.1f}",
        f"{network:.1f}",
        f"{network + labels:.1f}",
        f"{paper['latency']:.1f}",
    )
