"""Figures over the steps of one run or of several, from the records of `metrics.jsonl`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssaseg.cli.drawing.bars import plain, save_figure

# Keys of a training record that are not loss terms.
OTHER_KEYS = {"step", "lr", "loss", "grad_norm", "images_per_s", "data_wait", "skipped"}

MOST_TERMS = 32  # of a log that are drawn: no network has as many losses

SMOOTH = 300  # most points of a line; of more records it shows means, and the records themselves are drawn pale

Record = dict[str, Any]


class Line(NamedTuple):
    """Values over steps, float64 (n,) each; NaN where a record has none."""

    steps: np.ndarray
    values: np.ndarray


def line(records: Sequence[Record], key: str) -> Line:
    """The values of the records under `key`; None, infinity, and everything that is not a number, become NaN."""
    numbers = np.array([v if isinstance(v := record.get(key), int | float) else np.nan for record in records], float)
    return Line(np.array([r["step"] for r in records], float), np.where(np.isfinite(numbers), numbers, np.nan))


def trained(records: Sequence[Record]) -> list[Record]:
    """Records of training; each holds means since the record before."""
    return [record for record in records if "loss" in record]


def evaluated(records: Sequence[Record]) -> list[Record]:
    """Records of evaluations."""
    return [record for record in records if "mIoU" in record]


def loss_terms(logs: Sequence[Record]) -> list[str]:
    """Names of the loss terms, in the order of the log, without those that are 0 in all records: switched off."""
    names = list(dict.fromkeys(key for record in logs for key in record if key not in OTHER_KEYS))[:MOST_TERMS]
    return [name for name in names if np.nan_to_num(line(logs, name).values).any()]


def best_of(evaluations: Sequence[Record]) -> tuple[int, float] | None:
    """(step, mIoU [%]) of the best evaluation, the first if several are equal; None where no mIoU is a number."""
    score = line(evaluations, "mIoU")
    if np.isnan(score.values).all():
        return None
    index = int(np.nanargmax(score.values))
    return int(score.steps[index]), float(score.values[index])


def draw_curves(records: Sequence[Record], resumed: Sequence[int], title: str, destination: Path) -> None:
    """`curves.png`: each loss term, mIoU, learning rate, gradient norm and speed.

    records: those of `metrics.jsonl`. resumed: steps after which the run was resumed, drawn as dotted lines.
    """
    from matplotlib.figure import Figure

    logs, evaluations = trained(records), evaluated(records)
    figure = Figure(figsize=(16, 8), layout="constrained")
    places = figure.subplot_mosaic([["losses", "score", "norm"], ["losses", "rate", "speed"]], width_ratios=[1.5, 1, 1])
    draw_losses(places["losses"], logs)
    draw_score(places["score"], evaluations)
    draw_line(places["rate"], line(logs, "lr"), color="tab:gray")
    places["rate"].yaxis.set_major_formatter("{x:g}")
    places["rate"].set_title("learning rate of the backbone")
    draw_line(places["norm"], line(logs, "grad_norm"), color="tab:purple")
    scale(places["norm"], [line(logs, "grad_norm").values])
    places["norm"].set_title("norm of the gradient")
    draw_speed(places["speed"], logs)
    last = max([record["step"] for record in records], default=0)
    for axes in places.values():
        label_steps(axes)
        # From 0, so that all panels have the same axis, even if their first records differ.
        axes.set_xlim(0, max(last * 1.03, 1))
        if not axes.lines or all(np.isnan(np.asarray(each.get_ydata(), float)).all() for each in axes.lines):
            axes.text(0.5, 0.5, "nothing logged", ha="center", va="center", color="0.5", transform=axes.transAxes)
            axes.set_yticks([])
        for step in resumed:
            axes.axvline(step, color="0.4", linestyle=":", linewidth=1, zorder=0)
    figure.suptitle(plain(title) + ("   (dotted: resumed)" if resumed else ""), fontsize=11)
    save_figure(figure, destination, None, destination.parent)


def draw_losses(axes: Any, logs: Sequence[Record]) -> None:
    """The sum in black and its terms. The legend has the last value of each; it is below, as lines fill the panel."""
    terms = loss_terms(logs)
    for index, term in enumerate(["loss", *terms] if len(terms) != 1 else terms):
        values = line(logs, term)
        known = values.values[~np.isnan(values.values)]
        label = f"{term} {known[-1]:.3g}" if len(known) else term
        draw_line(axes, values, label=label, color=f"C{index - 1}" if index else "black")
    scale(axes, [line(logs, term).values for term in ["loss", *terms]])
    axes.set_title("losses, weighted")
    if logs:
        axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)


def draw_score(axes: Any, evaluations: Sequence[Record]) -> None:
    """The mIoU; its best value is marked, and written in the title."""
    score = line(evaluations, "mIoU")
    axes.plot(*score, color="tab:green", marker="o", markersize=4 if len(score.steps) <= 60 else 0)
    best = best_of(evaluations)
    if best is not None:
        axes.plot(*best, marker="*", markersize=12, color="tab:orange")
    axes.set_title("validation mIoU [%]" + (f", best {best[1]:.2f} at {best[0]}" if best else ""))


def draw_speed(axes: Any, logs: Sequence[Record]) -> None:
    """Images per second, and on the right axis the share of the time that was spent waiting for data."""
    speed = line(logs, "images_per_s")
    draw_line(axes, speed, color="tab:blue")
    if not np.isnan(speed.values).all():
        axes.set_ylim(0, np.nanmax(speed.values) * 1.1)
    axes.set_title("images/s")
    axes.title.set_color("tab:blue")
    waiting = line(logs, "data_wait")
    if not np.isnan(waiting.values).all():
        right = axes.twinx()
        draw_line(right, Line(waiting.steps, waiting.values * 100), color="tab:red")
        right.set_ylim(0, 100)
        right.set_ylabel("waiting for data [%]", color="tab:red")


def label_steps(axes: Any) -> None:
    """Step numbers along the axis, such as 40k, 80k: so few that they do not overlap."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step / 1000:g}k" if step >= 10000 else f"{step:g}"))
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)


def draw_line(axes: Any, values: Line, **style: Any) -> None:
    """A line; of many records the means over neighbours, and the records themselves in a pale colour."""
    many = len(values.steps) > 2 * SMOOTH  # with more points than pixels, noise would hide the trend
    if many:
        axes.plot(*values, linewidth=0.5, alpha=0.2, color=style.get("color"))
        values = smooth(values)
    axes.plot(*values, linewidth=1.4, marker="o" if len(values.steps) <= 30 else None, markersize=3, **style)


def smooth(values: Line) -> Line:
    """Means over `SMOOTH` groups of neighbouring records, without the records that have no value."""
    steps, groups = (np.array_split(each, SMOOTH) for each in values)
    numbers = [group[~np.isnan(group)] for group in groups]
    means = [group.mean() if len(group) else np.nan for group in numbers]
    return Line(np.array([group.mean() for group in steps]), np.array(means))


def scale(axes: Any, values: Sequence[np.ndarray]) -> None:
    """A logarithmic axis with plain numbers, if no value is negative and the values differ by a factor of 5 or more."""
    from matplotlib.ticker import LogLocator

    numbers = np.concatenate([np.asarray(each, float) for each in values]) if values else np.empty(0)
    numbers = numbers[np.isfinite(numbers)]
    positive = numbers[numbers > 0]
    if not len(positive) or numbers.min() < 0 or positive.max() < 5 * positive.min():
        return
    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7) if positive.max() < 30 * positive.min() else (1, 3)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")  # it would write numbers such as 6 × 10⁻¹ too
