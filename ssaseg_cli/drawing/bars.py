"""Bar charts: IoU per class, and the most confused pairs of classes."""

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssaseg.models.checkpoint import write_atomic

TALL = 58  # bars of a column


def draw_pairs(pairs: Sequence[Mapping[str, Any]], title: str, destination: Path) -> None:
    """`confused.png`: a bar a pair, its share of the true class's pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.27 * max(len(pairs), 1)), layout="constrained")
    axes = figure.subplots()
    shares = [pair["share"] for pair in pairs]
    axes.barh(range(len(pairs)), shares, color="tab:red", alpha=0.75)
    axes.set_yticks(range(len(pairs)), [f"{shorten(p['true'])} → {shorten(p['predicted'])}" for p in pairs])
    for row, pair in enumerate(pairs):
        axes.text(pair["share"], row, f" {pair['share']:.1f} %   {pair['pixels']:,} px", va="center", fontsize=8)
    if not pairs:
        axes.text(0.5, 0.5, "no pixel is wrong", ha="center", transform=axes.transAxes)
    axes.set(xlabel="share of the true class's pixels [%]", xlim=(0, max([*shares, 1]) * 1.3))
    finish_bars(axes, len(pairs))
    figure.suptitle(f"most confused: true class → predicted class\n{title}", fontsize=10)
    save_figure(figure, destination)


def draw_ious(
    iou: np.ndarray,
    labelled: np.ndarray,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    title: str,
    destination: Path,
) -> None:
    """`iou.png`: a bar a class in its colour, the best first; classes without a labelled pixel say so.

    iou: float (K) [%], NaN where there is neither label nor prediction; labelled: int (K) pixels; palette: RGB.
    """
    from matplotlib.figure import Figure

    order = np.argsort(-np.nan_to_num(iou, nan=-1), kind="stable")
    columns = -(-len(order) // TALL)
    parts = np.array_split(order, columns)
    figure = Figure(figsize=(max(4.6 * columns, 7), 1.2 + 0.21 * max(len(parts[0]), 4)), layout="constrained")
    for axes, part in zip(figure.subplots(1, columns, squeeze=False)[0], parts, strict=True):
        values = np.nan_to_num(iou[part])
        colours = [tuple(channel / 255 for channel in palette[index]) for index in part]
        axes.barh(range(len(part)), values, color=colours, edgecolor="0.4", linewidth=0.5)
        axes.set_yticks(range(len(part)), [shorten(classes[index]) for index in part])
        for row, index in enumerate(part):
            remark = "" if labelled[index] else "no ground truth" + ("" if np.isnan(iou[index]) else ", predicted")
            value = "" if np.isnan(iou[index]) else f"{iou[index]:.1f}"
            text = axes.text(values[row] + 1, row, f"{value}  {remark}".strip(), va="center", fontsize=8, color="0.15")
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # the mean's line ends there
        if not np.isnan(iou).all():
            axes.axvline(float(np.nanmean(iou)), color="0.2", linestyle="--", linewidth=1)
        axes.set(xlabel="IoU [%]; dashed: the mean", xlim=(0, 112), xticks=range(0, 101, 20))
        finish_bars(axes, len(part))
    figure.suptitle(title, fontsize=10)
    save_figure(figure, destination)


def finish_bars(axes: Any, bars: int) -> None:
    """The first bar on top, no frame but the left."""
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.set_ylim(max(bars, 1) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def shorten(name: str, most: int = 24) -> str:
    """A class name that leaves room for the bars; "$", which begins a formula to matplotlib, escaped."""
    return (name if len(name) <= most else name[: most - 1] + "…").replace("$", r"\$")


def save_figure(figure: Any, destination: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a figure as PNG, atomically. Letters that the font lacks become boxes, without a warning each."""
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(picture, dpi=110, metadata=metadata)
    write_atomic(destination, picture.getvalue(), sync=False)
