"""The pictures and the table over all images, from the report that `explain.json` holds."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssaseg.cli.console import print_table
from ssaseg.cli.drawing.bars import finish_bars, plain, save_figure, shorten
from ssaseg.cli.printing import echo
from ssaseg.files.text import printable

MOST_CLASSES, MOST_PAIRS = 60, 20  # in a picture
COLOURS = {"coarse": "tab:orange", "final": "tab:blue", "against": "tab:green"}

Report = Mapping[str, Any]


def draw(report: Report, captions: Mapping[str, str], folder: Path) -> None:
    """Writes `distance.png`, `rim_and_middle.png`, `confused-FIRST.png` and `prototypes.png` into `folder`, as far as
    the report has what they show. Those of an earlier run are removed.
    """
    for name in ("distance", "rim_and_middle", "prototypes", *(f"confused-{first}" for first in COLOURS)):
        (folder / f"{name}.png").unlink(missing_ok=True)
    draw_distance(report, captions, folder / "distance.png")
    draw_classes(report, captions, folder / "rim_and_middle.png")
    for each in report["changes"]:
        if each.get("pairs"):
            draw_pairs(each, captions, folder / f"confused-{each['from']}.png")
    if report["prototypes"]:
        draw_prototypes(report["prototypes"], folder / "prototypes.png")


def draw_distance(report: Report, captions: Mapping[str, str], destination: Path) -> None:
    """The means of each classifier over the distance to the mask's edge; below, how many pixels are that far away."""
    from matplotlib.figure import Figure

    bins = report["confidence_by_distance"]
    figure = Figure(figsize=(16, 5.5), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, height_ratios=[4, 1])
    agreement = "share of pixels with the mask's label" + (" (right)" if "scores" in report else "")
    titles = {
        "confidence": "probability of the mask's class",
        "strength": "logit of the mask's class, standardised over the image",
        "agreement": agreement,
    }
    for column, (key, title) in enumerate(titles.items()):
        upper, lower = axes[:, column]
        for name, caption in captions.items():
            values = [each[key][name] for each in bins]
            upper.plot(range(len(bins)), values, marker="o", markersize=4, color=COLOURS[name], label=plain(caption))
        upper.set_title(title, fontsize=10)
        upper.grid(alpha=0.3)
        total = sum(each["pixels"] for each in bins)
        lower.bar(range(len(bins)), [100 * each["pixels"] / total for each in bins], color="0.7")
        lower.set_ylabel("pixels [%]")
        lower.set_xticks(range(len(bins)), [interval(each) for each in bins], fontsize=8, rotation=45)
        lower.set_xlabel("distance to the mask's edge [pixels]")
    axes[0, 0].legend(fontsize=9)
    figure.suptitle(f"from the rim to the middle of the masks, {count(report['images'])}", fontsize=11)
    save_figure(figure, destination, None, destination.parent)


def count(images: int) -> str:
    """A number of images as text."""
    return f"{images} image{'' if images == 1 else 's'}"


def interval(each: Mapping[str, Any]) -> str:
    """A bin of distances as the label of an axis."""
    first, below = each["from"], each["below"]
    return f"≥ {first}" if below is None else str(first) if below == first + 1 else f"{first}–{below - 1}"


def draw_classes(report: Report, captions: Mapping[str, str], destination: Path) -> None:
    """Confidence in the rim and in the middle of each class's masks: one dot for each classifier."""
    from matplotlib.figure import Figure

    rows = report["rim_and_middle"]["classes"][:MOST_CLASSES]
    figure = Figure(figsize=(12, 1.6 + 0.27 * max(len(rows), 4)), layout="constrained")
    places = figure.subplots(1, 2, sharey=True)
    for axes, part in zip(places, ("rim", "middle"), strict=True):
        for row, each in enumerate(rows):
            values = [value for value in each[part]["confidence"].values() if value is not None]
            if values:
                axes.plot([min(values), max(values)], [row, row], color="0.75", linewidth=3, zorder=1)
            for name, value in each[part]["confidence"].items():
                label = plain(captions[name]) if row == 0 else None
                axes.plot(np.nan if value is None else value, row, "o", color=COLOURS[name], markersize=6, label=label)
        axes.set_yticks(range(len(rows)), [shorten(each["name"]) for each in rows])
        axes.set(xlim=(-0.02, 1.02), xlabel="mean probability of the mask's class")
        finish_bars(axes, len(rows))
        axes.set_title(part, fontsize=10)
    figure.legend(*places[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    save_figure(figure, destination, None, destination.parent)


def draw_pairs(change: Mapping[str, Any], captions: Mapping[str, str], destination: Path) -> None:
    """The pairs of classes that changed most. Left: each way, pixels that are right now or no longer; right: both ways
    together, all errors before and after.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    def most(pairs: Sequence[dict[str, Any]], gain: Callable[[dict[str, Any]], int]) -> list[dict[str, Any]]:
        return sorted(sorted(pairs, key=lambda pair: -abs(gain(pair)))[:MOST_PAIRS], key=lambda pair: -gain(pair))

    pairs = most(change["pairs"], lambda pair: pair["fixed"] - pair["broken"])
    sums = most(change["both_ways"], lambda pair: pair["before"] - pair["after"])
    figure = Figure(figsize=(17, 1.6 + 0.3 * max(len(pairs), len(sums), 3)), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = {key: plain(captions[change[key]]) for key in ("from", "to")}
    left.barh(range(len(pairs)), [pair["fixed"] for pair in pairs], color="tab:green", alpha=0.75, label="now right")
    worse = [-pair["broken"] for pair in pairs]
    left.barh(range(len(pairs)), worse, color="tab:red", alpha=0.75, label="no longer right")
    for row, pair in enumerate(pairs):
        left.text(pair["fixed"], row, f" {pair['before']:,} → {pair['after']:,}", va="center", fontsize=8)
    left.set_yticks(range(len(pairs)), [f"{shorten(p['true'])} → {shorten(p['predicted'])}" for p in pairs])
    left.axvline(0, color="0.3", linewidth=1)
    longest = max(max(pair["fixed"], pair["broken"]) for pair in pairs)
    left.set(xlabel="pixels; numbers: all errors before → after", xlim=(-longest * 1.1, longest * 1.45))
    left.set_title("true class → predicted class", fontsize=10)
    for key, shift, name in (("before", -0.2, "from"), ("after", 0.2, "to")):
        rows, values = [row + shift for row in range(len(sums))], [pair[key] for pair in sums]
        right.barh(rows, values, height=0.4, color=COLOURS[change[name]], label=names[name])
    right.set_yticks(range(len(sums)), [" – ".join(map(shorten, pair["classes"])) for pair in sums])
    right.set(xlabel="pixels that are wrong")
    right.set_title("one class taken for the other, both ways", fontsize=10)
    for axes, bars in ((left, pairs), (right, sums)):
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
        finish_bars(axes, len(bars))
        axes.legend(fontsize=8, loc="lower right" if axes is left else "best")
    title = f"from “{names['from']}” to “{names['to']}”: the pairs of classes that changed most"
    figure.suptitle(title, fontsize=11)
    save_figure(figure, destination, None, destination.parent)


def draw_prototypes(rows: Sequence[Mapping[str, Any]], destination: Path) -> None:
    """How far semantic prototypes moved, and, if there are any, spatial prototypes' cosine in the masks and outside."""
    from matplotlib.figure import Figure

    rows = rows[:MOST_CLASSES]
    figure = Figure(figsize=(12, 1.6 + 0.27 * max(len(rows), 4)), layout="constrained")
    titles = ["semantic prototypes", "spatial prototypes: cosine with the spatial feature"]
    if all(each["spatial_inside"] is None for each in rows):
        titles.pop()
    left, *others = every = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    places = range(len(rows))

    def dots(axes: Any, key: str, label: str, colour: str) -> None:
        values = [np.nan if each[key] is None else each[key] for each in rows]
        axes.plot(values, places, "o", color=colour, markersize=6, label=label)

    dots(left, "semantic_cosine", "cosine of fixed and adapted prototype", "tab:blue")
    dots(left, "consistency", "consistency over the images (1: always the same)", "0.5")
    for right in others:
        dots(right, "spatial_inside", "inside the class's mask", "tab:blue")
        dots(right, "spatial_outside", "outside", "tab:orange")
    left.set_yticks(places, [f"{shorten(each['name'])} ({count(each['images'])})" for each in rows])
    for axes, title in zip(every, titles, strict=True):
        axes.axvline(0, color="0.3", linewidth=1)
        axes.set_xlim(-1.05, 1.05)
        finish_bars(axes, len(rows))
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2, frameon=False)
    save_figure(figure, destination, None, destination.parent)


# ---- printing ----------------------------------------------------------------------------------------------------
def print_summary(report: Report, captions: Mapping[str, str]) -> None:
    """Prints the means of each classifier, and what changed, on stdout."""

    def cell(value: float | None, factor: int = 1, digits: int = 2) -> str:
        return "–" if value is None else f"{value * factor:.{digits}f}"

    rows = []
    for name, caption in captions.items():
        parts = report["rim_and_middle"]["all_pixels"]
        values = [cell(parts[part]["confidence"][name], 1, 3) for part in ("rim", "middle")]
        values += [cell(parts[part]["agreement"][name], 100) for part in ("rim", "middle")]
        if "scores" in report:
            values.append(cell(report["scores"][name]["mIoU"]))
        rows.append((caption, *values))
    known = "scores" in report
    share = "right [%]: rim" if known else "same label [%]: rim"
    head = ("classifier", "probability: rim", "middle", share, "middle", *(["mIoU [%]"] if known else []))
    print_table(head, rows, count(report["images"]))
    for each in report["changes"]:
        change = f"{captions[each['from']]} → {captions[each['to']]}: {each['pixels_changed']:,} pixels changed"
        echo(change + (f", {each['better']:,} now right, {each['worse']:,} no longer right" if known else ""))
        for heading, pairs in (("fewer", each.get("both_ways", [])), ("more", each.get("both_ways", [])[::-1])):
            texts = [
                f"{' – '.join(map(printable, pair['classes']))} {pair['before']:,} → {pair['after']:,}"
                for pair in pairs[:3]
                if (pair["before"] > pair["after"]) == (heading == "fewer")
            ]
            if texts:
                echo(f"  {heading} confusions, both ways [pixels]: {'; '.join(texts)}")
