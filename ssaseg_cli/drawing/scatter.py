"""Points with names in a plane: what a network scores, against the time that it takes."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ssaseg.cli.drawing.bars import plain, save_figure, shorten

# Colours that people with any colour vision tell apart (Okabe and Ito 2008), without yellow, which is pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDE = 5  # ratio of the largest and the smallest x from which on the axis is logarithmic
GAPS = (7, 16, 28, 42)  # from a point to its name [points]: the first at which the name covers nothing is taken
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))  # right, up
DOT = 5.5  # half the side of a marker [points]

Box = tuple[float, float, float, float]  # left, bottom, right, top [pixels]


class Point(NamedTuple):
    """A point, its name, the group that gives its colour and marker, and an interval of y or None."""

    x: float
    y: float
    name: str
    group: str
    interval: tuple[float, float] | None = None


def draw_scatter(
    points: Sequence[Point],
    front: Sequence[Point],
    axes_names: tuple[str, str],
    title: str,
    destination: Path,
    metadata: dict[str, str],
) -> None:
    """The points with their names, one colour and marker for each group, and a dashed line through `front`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    groups = list(dict.fromkeys(point.group for point in points))
    colours = {group: COLOURS[index % len(COLOURS)] for index, group in enumerate(groups)}
    for index, (group, colour) in enumerate(colours.items()):
        members = [point for point in points if point.group == group]
        marker = MARKERS[index % len(MARKERS)]
        axes.scatter(
            [point.x for point in members],
            [point.y for point in members],
            s=64,
            c=colour,
            marker=marker,
            edgecolors="white",
            linewidths=0.8,
            label=plain(group),
            zorder=3,
        )
        for point in members:
            if point.interval is not None:
                axes.plot([point.x, point.x], point.interval, color=colour, linewidth=1.2, alpha=0.6, zorder=2)
    if len(front) > 1:
        line = sorted(front)
        label = "no other is both faster and better"
        axes.plot([p.x for p in line], [p.y for p in line], "--", color="0.55", linewidth=1, zorder=1, label=label)
    finish_axes(axes, points, axes_names)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, frameon=False, fontsize=9)
    axes.set_title(plain(title), fontsize=11)
    figure.canvas.draw()  # places the axes, so that lengths in pixels are known
    name_points(axes, points, colours)
    save_figure(figure, destination, metadata)


def finish_axes(axes: Any, points: Sequence[Point], names: tuple[str, str]) -> None:
    """Names of the axes, a grid, and space for the names of points around them; a wide range of x is logarithmic."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    low, high = min(point.x for point in points), max(point.x for point in points)
    if high > WIDE * low:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter("")
        axes.set_xlim(low / 1.4, high * 1.7)
    else:
        span = (high - low) or high or 1.0
        axes.xaxis.set_major_locator(MaxNLocator(7))
        axes.set_xlim(max(low - 0.15 * span, 0), high + 0.3 * span)
    axes.xaxis.set_major_formatter("{x:g}")
    bottom = min(min(point.interval or (point.y,)) for point in points)
    top = max(max(point.interval or (point.y,)) for point in points)
    margin = 0.12 * (top - bottom) or 1.0
    axes.set_ylim(bottom - margin, top + margin)
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def name_points(axes: Any, points: Sequence[Point], colours: Mapping[str, str]) -> None:
    """Writes each name beside its point, where it covers no other name and no point; a far name gets a thin line."""
    renderer, scale = axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    inside = axes.get_window_extent(renderer).extents
    taken: list[Box] = []
    for point in points:
        x, y = axes.transData.transform((point.x, point.y))
        ends = [axes.transData.transform((point.x, end))[1] for end in point.interval or ()]
        taken.append((x - DOT * scale, y - DOT * scale, x + DOT * scale, y + DOT * scale))
        taken.append((x - 1, min(ends, default=y), x + 1, max(ends, default=y)))
    for point in points:
        anchor = (point.x, point.y)
        text = axes.annotate(
            shorten(point.name, 40), anchor, (0, 0), textcoords="offset points", fontsize=8.5, zorder=4
        )
        text.set_in_layout(False)
        extent, (x, y) = text.get_window_extent(renderer), axes.transData.transform(anchor)

        def box(place: tuple[int, tuple[int, int]], x: float = x, y: float = y, extent: Any = extent) -> Box:
            gap, (right, up) = place
            left = x + right * gap * scale + (right - 1) / 2 * extent.width
            bottom = y + up * gap * scale + (up - 1) / 2 * extent.height
            return left, bottom, left + extent.width, bottom + extent.height

        def covered(place: tuple[int, tuple[int, int]], area: float = extent.width * extent.height) -> float:
            own = box(place)
            return sum(_shared(own, other) for other in taken) + area - _shared(own, inside)

        gap, (right, up) = place = min(product(GAPS, DIRECTIONS), key=covered)  # the first of equal ones
        taken.append(box(place))
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5})  # over the dashed line
        text.set(color=colours[point.group], ha=("center", "left", "right")[right], va=("center", "bottom", "top")[up])
        text.set_position((right * gap, up * gap))
        if gap > GAPS[0]:
            arrow = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": DOT}
            line = axes.annotate("", anchor, (right * gap, up * gap), textcoords="offset points", arrowprops=arrow)
            line.set_in_layout(False)


def _shared(one: Sequence[float], other: Sequence[float]) -> float:
    """The area that two boxes share [square pixels]."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)
