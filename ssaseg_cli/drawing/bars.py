"""Bar charts: IoU per class, and the most confused pairs of classes."""

import io
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssaseg.cli.errors import CommandError
from ssaseg.files.text import KEPT, printable
from ssaseg.files.writing import write_atomic

MOST_BARS = 58  # bars in one column


def draw_pairs(pairs: Sequence[Mapping[str, Any]], title: str, destination: Path) -> None:
    """`confused.png`: one bar for each pair, its length the share of the true class's pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.27 * max(len(pairs), 1)), layout="constrained")
    axes = figure.subplots()
    shares = [pair["share"] for pair in pairs]
    axes.barh(range(len(pairs)), shares, color="tab:red", alpha=0.75)
    axes.set_yticks(range(len(pairs)), [f"{shorten(p['true'])} → {shorten(p['predicted'])}" for p in pairs])
    for row, pair in enumerate(pairs):
        axes.text(pair["share"], row, f" {pair['share']:.1f} %   {pair['pixels']:,} px", va="center", fontsize=8)
    if not pairs:
        axes.text(0.5, 0.5, "all pixels are right", ha="center", transform=axes.transAxes)
    axes.set(xlabel="share of the true class's pixels [%]", xlim=(0, max([*shares, 1]) * 1.3))
    finish_bars(axes, len(pairs))
    figure.suptitle(f"most confused: true class → predicted class\n{plain(title)}", fontsize=10)
    save_figure(figure, destination, None, destination.parent)


def draw_ious(
    iou: np.ndarray,
    labelled: np.ndarray,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    title: str,
    destination: Path,
) -> None:
    """`iou.png`: one bar for each class in its colour, the best first; classes without a labelled pixel are marked.

    iou: float (K) [%], NaN where there is neither label nor prediction; labelled: int (K) pixels; palette: RGB.
    """
    from matplotlib.figure import Figure

    order = np.argsort(-np.nan_to_num(iou, nan=-1), kind="stable")
    columns = np.array_split(order, -(-len(order) // MOST_BARS))
    size = max(4.6 * len(columns), 7), 1.2 + 0.21 * max(len(columns[0]), 4)
    figure = Figure(figsize=size, layout="constrained")
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        values = np.nan_to_num(iou[column])
        colours = [tuple(channel / 255 for channel in palette[index]) for index in column]
        axes.barh(range(len(column)), values, color=colours, edgecolor="0.4", linewidth=0.5)
        axes.set_yticks(range(len(column)), [shorten(classes[index]) for index in column])
        for row, index in enumerate(column):
            remark = "" if labelled[index] else "no ground truth" + ("" if np.isnan(iou[index]) else ", predicted")
            value = "" if np.isnan(iou[index]) else f"{iou[index]:.1f}"
            text = axes.text(values[row] + 1, row, f"{value}  {remark}".strip(), va="center", fontsize=8, color="0.15")
            text.set_bbox(
                {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            )  # so that the line of the mean does not cross the text
        if not np.isnan(iou).all():
            axes.axvline(float(np.nanmean(iou)), color="0.2", linestyle="--", linewidth=1)
        axes.set(xlabel="IoU [%]; dashed: the mean", xlim=(0, 112), xticks=range(0, 101, 20))
        finish_bars(axes, len(column))
    figure.suptitle(plain(title), fontsize=10)
    save_figure(figure, destination, None, destination.parent)


def finish_bars(axes: Any, bars: int) -> None:
    """The first bar on top, and of the frame only the left side."""
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.set_ylim(max(bars, 1) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def shorten(name: str, most: int = 24) -> str:
    """A class name, cut to leave space for the bars."""
    name = printable(name)
    return plain(name if len(name) <= most else name[: most - 1] + "…")


def plain(text: str) -> str:
    """Text from outside for matplotlib: without control characters; "$", which starts a formula, is escaped."""
    return printable(text, KEPT).replace("$", r"\$")


def save_figure(
    figure: Any, destination: Path, metadata: Mapping[str, str] | None = None, root: Path | None = None
) -> None:
    """Writes a figure as PNG, atomically. Letters that the font does not have become boxes, without warnings. `root`:
    see `write_atomic`; for a picture in a run folder, the folder.
    """
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(picture, dpi=110, metadata=metadata)
    write_atomic(destination, picture.getvalue(), sync=False, root=root)


def require_picture(path: Path, command: str) -> None:
    """Raises CommandError where `path`, of `--out`, is not a .png, cannot be written, or is a file that another program
    wrote. command: what stands as Software in the pictures of this one, such as "ssaseg compare".
    """
    from ssaseg.datasets.decoding import open_image
    from ssaseg.files.reading import read_file

    if path.suffix != ".png" or path.is_dir():
        raise CommandError(f"--out {path}: expected a file that ends in .png")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise CommandError(
            f"--out {path}: {path.parent} is not a folder that can be written\ncreate it, or give another folder"
        )
    if not path.exists():
        return
    try:
        with open_image(read_file(path)) as image:
            ours = image.info.get("Software") == command
    except Exception:  # Pillow's readers raise ten types for damaged files
        ours = False
    if not ours:
        raise CommandError(f"--out {path}: already exists and is not a picture of `{command}`\ngive another name")
