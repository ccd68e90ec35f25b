"""`ssaseg profile --paper-table`: what our networks cost, linear and ssa, beside the paper's figures.

The paper: SSA-Seg (NeurIPS 2024, arXiv 2405.06525), the tables of its general and its lightweight models, for 150
classes at 512×512. Figures of the general models with SSA are those of the authors' README, those of FCN and
Swin-B the paper's. Without SSA, only some GMACs are known here.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssaseg.cli.console import json_target, print_table, write_json
from ssaseg.cli.device import select_device
from ssaseg.cli.printing import echo
from ssaseg.cli.profiling.counting import COUNTINGS, EVERY_OPERATION, MODULES_ONLY, count
from ssaseg.cli.profiling.latency import measure_latency
from ssaseg.cli.profiling.mask_table import measure_masks, print_masks
from ssaseg.cli.profiling.profile import conditions
from ssaseg.cli.profiling.targets import CLASSES
from ssaseg.cli.scoring.engines import TorchEngine
from ssaseg.models import build_model
from ssaseg.recipes import list_recipes, recipe_file, recipe_text

SIZE = (512, 512)


class Published(NamedTuple):
    """A row of the paper's table. None: not known here."""

    parameters: float | None  # [M]
    gmacs: float | None  # [GMACs], which the paper calls GFLOPs
    latency: float | None  # [ms], on the authors' GPU


PAPER: dict[str, dict[str, Published]] = {
    "fcn_r101": {"linear": Published(None, 275.7, None), "ssa": Published(None, 275.9, None)},
    "ocrnet_hr48": {"linear": Published(None, 164.8, None), "ssa": Published(8.7, 165.0, 69.3)},
    "segformer_b5": {"linear": Published(None, None, None), "ssa": Published(82.3, 52.6, 70.1)},
    "upernet_swin_t": {"linear": Published(None, None, None), "ssa": Published(61.1, 236.3, 54.3)},
    "upernet_swin_b": {"linear": Published(None, 297.2, None), "ssa": Published(None, 297.5, None)},
    "upernet_swin_l": {"linear": Published(None, None, None), "ssa": Published(234.9, 405.2, 107.3)},
    "upernet_vit_adapter_l": {"linear": Published(None, None, None), "ssa": Published(364.9, 616.3, 284.9)},
    "afformer_b": {"linear": Published(3.0, 4.3, 25.1), "ssa": Published(3.3, 4.4, 26.0)},
    "seaformer_b": {"linear": Published(8.6, 1.8, 26.8), "ssa": Published(8.8, 1.8, 27.3)},
    "segnext_t": {"linear": Published(4.3, 6.2, 22.8), "ssa": Published(4.6, 6.3, 23.3)},
    "seaformer_l": {"linear": Published(14.0, 6.4, 29.4), "ssa": Published(14.2, 6.4, 29.9)},
    "cgrseg_b": {"linear": Published(19.1, 7.7, 36.0), "ssa": Published(19.3, 7.6, 36.0)},
    "cgrseg_l": {"linear": Published(35.7, 14.9, 43.3), "ssa": Published(35.8, 14.8, 42.6)},
}

MIOU = re.compile(r"published: mIoU ([0-9.]+) %")  # in the header of a recipe
DATA_SETS = {"ade20k": "ADE20K", "coco_stuff10k": "COCO-Stuff-10K", "pascal_context_59": "PASCAL-Context"}

# Parameters that the official models have but never use. The paper counts them.
NEVER_USED = {"afformer_b": 66_048}

# Printed below the table: figures of the paper that no counting gives, and networks that are not defined exactly.
REMARKS = {
    "ocrnet_hr48": "the published 8.7 M parameters are a misprint: its convolutions alone have more than 60 M",
    "segformer_b5": "the published 52.6 GMACs cannot be reproduced: the official code has 52.5 in this counting",
    "fcn_r101": "the authors have published neither its configuration nor its head with SSA. Ours, by mmsegmentation's "
    "configuration with 101 layers, has the paper's GMACs",
}


def run_paper_table(json_out: str | None, device: str, runs: int) -> int:
    """Measures all networks of the paper's tables and prints the tables. Returns 0.

    One network at a time is in memory, with both classifiers, which take turns. json_out: a file; "-": stdout, without
    the table; or None. runs: timed passes of each network.
    """
    chosen = select_device(device)
    json_out = json_target(json_out)
    image = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0)).to(chosen)
    rows = []
    for name in PAPER:
        echo(f"{name} is measured", err=True)  # the largest takes minutes on a CPU
        rows += measure(name, image, runs)
    report = {
        "classes": CLASSES,
        "size": list(SIZE),
        **conditions(chosen, runs),
        "rows": rows,
        "masks": measure_masks(image, runs),
    }
    write_json(json_out, report)  # before printing, which may fail
    if json_out != "-":
        print_paper_table(report)
    return 0


def measure(name: str, image: Tensor, runs: int) -> list[dict[str, Any]]:
    """The rows of one network: with each classifier that the paper has figures of. `image` is on the device."""
    models = [build_model(name, CLASSES, classifier).eval().requires_grad_(False) for classifier in PAPER[name]]
    rows = [describe(name, model.classifier_name, count(model, image)) for model in models]
    engines = [TorchEngine.of(model, image.device, exact=True) for model in models]  # as the paper measures them
    for row, timings in zip(rows, measure_latency(engines, image, runs), strict=True):
        row.update(timings)
    return rows


def describe(name: str, classifier: str, counts: dict[str, Any]) -> dict[str, Any]:
    """A row without timings: what `counting.count` found for a network, beside the paper's figures.

    `parameters` [M], as the paper counts them: without SSA's teacher, but with auxiliary heads, and with those that the
    official model has but never uses. `deviation_percent`: None where the paper's figure is not known.
    """
    parameters = (counts["parameters_deployed"] + counts["parameters_auxiliary"] + NEVER_USED.get(name, 0)) / 1e6
    paper = PAPER[name][classifier]
    return {
        "model": name,
        "classifier": classifier,
        "parameters": parameters,
        "never_used": NEVER_USED.get(name, 0),
        "gmacs": counts["gmacs"],
        "paper": paper._asdict(),
        "published_mIoU": {dataset: published_miou(dataset, name, classifier) for dataset in DATA_SETS},
        "deviation_percent": {
            "parameters": _deviation(parameters, paper.parameters),
            "gmacs": _deviation(counts["gmacs"][MODULES_ONLY], paper.gmacs),
        },
    }


def published_miou(dataset: str, model: str, classifier: str) -> float | None:
    """The published score [%] that the header of the shipped recipe states; None where there is none."""
    name = f"{dataset}-{model}-{classifier}"
    found = MIOU.search(recipe_text(recipe_file(name))) if name in list_recipes() else None
    return float(found[1]) if found else None


def _deviation(ours: float, theirs: float | None) -> float | None:
    return None if theirs is None else 100 * (ours / theirs - 1)


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
        *(f"mIoU [%] {name}" for name in DATA_SETS.values()),
    )
    print_table(columns, [_cells(row) for row in report["rows"]], _title(report))
    echo(
        "parameters: as the paper counts them, without SSA's teacher and with auxiliary heads; in percent: our "
        "deviation from the paper; -: not known here"
    )
    for name, reason in REMARKS.items():
        echo(f"{name}: {reason}")
    for name, unused in NEVER_USED.items():
        echo(f"{name}: as in the paper, with {unused:,} parameters that the official model has but never uses")
    for name, meaning in COUNTINGS.items():
        echo(f"{name}: {meaning}")
    measured = f"{report['device']}, {report['threads']} CPU threads, torch {report['torch']}"
    echo(
        f"latency: of the exact networks, nothing folded; {measured}; {report['runs']} timed passes each, in turn; the "
        "paper's latency: on its authors' GPU"
    )
    echo(
        "mIoU: published, not measured here: validation split, single scale; `ssaseg recipes show` prints the source; "
        "-: not published or not known here"
    )
    if report["masks"]:
        print_masks(report["masks"], report["rows"], _title(report))


def _title(report: dict[str, Any]) -> str:
    height, width = report["size"]
    return f"{report['classes']} classes, {height}x{width}, float32, batch 1"


def _cells(row: dict[str, Any]) -> Sequence[str]:
    paper, deviation = row["paper"], row["deviation_percent"]
    network, labels = row["network_ms"]["p50"], row["post_ms"]["p50"]
    return (
        f"{row['model']} {row['classifier']}",
        f"{row['parameters']:.3f}{_percent(deviation['parameters'])}",
        _figure(paper["parameters"]),
        f"{row['gmacs'][EVERY_OPERATION]:.3f}",
        f"{row['gmacs'][MODULES_ONLY]:.3f}{_percent(deviation['gmacs'])}",
        _figure(paper["gmacs"]),
        f"{network:.1f}",
        f"{network + labels:.1f}",
        _figure(paper["latency"]),
        *(_figure(score, 2) for score in row["published_mIoU"].values()),
    )


def _figure(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f" ({value:+.1f} %)"
