"""Is B better than A? The test of two sides on the same images, in words, as tables and as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssaseg.cli.comparison.blocks import FEW, blocks_of, sequences_in
from ssaseg.cli.comparison.sides import Counts, Request, Side, count_sides
from ssaseg.cli.console import print_table
from ssaseg.cli.errors import CommandError
from ssaseg.cli.evaluation.several import short_names
from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.metrics import iou_of, mean_iou
from ssaseg.cli.scoring.paired import (
    LEVEL,
    POWER,
    RESAMPLES,
    Difference,
    Paired,
    compare_rows,
    neighbour_correlation,
    sum_blocks,
)
from ssaseg.files.text import cut, printable

ROUGH = 20  # with fewer blocks, the interval is rough
MOST_CLASSES = 25  # classes in the table: those with the smallest p; the JSON has all
SEEDS = (
    "tested are these two sets of labels, not two methods: another seed of the same recipe may change a score more; "
    "to compare methods, train several seeds of each"
)


def test_sides(sides: Sequence[Side], request: Request) -> dict[str, Any]:
    """The report on the difference of two sides, as JSON values. Raises what `count_sides` raises, and CommandError for
    fewer than two images or blocks.
    """
    counts = count_sides(sides, request)
    images = len(counts.names)
    if images < 2:
        raise CommandError(f"compare: {images} image in the {request.split} split; a test needs two or more")
    block = np.arange(images) if request.blocks is None else blocks_of(counts.names, request.blocks)
    first, second = (sum_blocks(rows, block) for rows in counts.rows)
    paired = compare_rows(first, second, counts.labelled)
    paths = [str(side.path) for side in sides]
    frames = _frames_note(counts) if request.blocks is None else None
    return {
        "a": {"path": paths[0], "file": str(sides[0].file), "kind": sides[0].kind, "what": counts.what[0]},
        "b": {"path": paths[1], "file": str(sides[1].file), "kind": sides[1].kind, "what": counts.what[1]},
        "recipe": counts.recipe,
        "split": request.split,
        "images": images,
        "blocks": {"rule": request.blocks, "count": paired.blocks, "largest": int(np.bincount(block).max())},
        "protocol": counts.protocol,
        "permutations": {"count": paired.swaps, "all": paired.exact},
        "resamples": RESAMPLES,
        "level": LEVEL,
        "power": POWER,
        **_figures(counts, paired),
        "notes": [*([frames] if frames else []), *_block_notes(paired, request), SEEDS],
        "verdict": verdict(paired, short_names(paths), request.blocks is not None, frames is not None),
    }


def _figures(counts: Counts, paired: Paired) -> dict[str, Any]:
    """The scores [%] of both sides, and their differences: of the mIoU and of the classes."""
    sums = [iou_of(rows.sum(axis=0, dtype=np.int64)[None]) for rows in counts.rows]
    first, second = (float(mean_iou(*each)[0]) for each in sums)
    classes = []
    for k, name in enumerate(counts.classes):
        scores = [float(iou[0, k]) if present[0, k] else None for iou, present in sums]
        classes.append({"name": name, "a": scores[0], "b": scores[1], **_as_json(paired.classes[k])})
    return {"mIoU": {"a": first, "b": second, **_as_json(paired.mean)}, "classes": classes}


def _as_json(found: Difference | None) -> dict[str, Any]:
    if found is None:
        return {"difference": None, "interval": None, "p": None, "holm": None, "smallest": None, "shown": False}
    interval = None if found.interval is None else found.interval._asdict()
    return {
        "difference": found.value,
        "interval": interval,
        "p": found.p,
        "holm": found.holm,
        "smallest": found.smallest,
        "shown": found.shown,
    }


# ---- words -------------------------------------------------------------------------------------------------------
def verdict(paired: Paired, names: Sequence[str], in_blocks: bool, frames: bool) -> str:
    """The result for the mIoU as text. names: of A and B. frames: whether the images may be frames of videos."""
    found = paired.mean
    first, second = map(printable, names)
    if found.value == 0 and found.smallest is None:
        return f"no difference shown: {first} and {second} have the same counts in every image"
    range_ = ""
    if found.interval is not None:
        range_ = f"{LEVEL:g} % interval {found.interval.low:+.2f} to {found.interval.high:+.2f}, "
    figures = f"{second} minus {first}: {found.value:+.2f} points of mIoU ({range_}permutation test p = {found.p:.2g})"
    if found.shown:
        better, worse = (second, first) if found.value > 0 else (first, second)
        only = ", if the images are independent" if frames else ""
        return f"difference shown{only}: {better} is better than {worse}. {figures}"
    limit = ""
    if found.smallest is not None:
        what = "blocks" if in_blocks else "images"
        limit = (
            f"; with these {paired.blocks} {what}, a true difference of {found.smallest:.2f} points is found in "
            f"{100 * POWER:g} of 100 cases, a smaller one less often"
        )
    return f"no difference shown. {figures}. This does not show that they are equal{limit}"


def class_verdict(classes: Sequence[Mapping[str, Any]]) -> str:
    """The classes whose difference is shown, as one line."""
    tested = [row for row in classes if row["holm"] is not None]
    shown = sorted((row for row in tested if row["shown"]), key=lambda row: row["holm"])
    texts = [f"{printable(row['name'])} {row['difference']:+.2f} (p = {row['holm']:.2g})" for row in shown]
    how = f"Holm's correction over {len(tested)} classes"
    return f"classes with a difference ({how}): {', '.join(texts)}" if texts else f"no class with a difference ({how})"


def _frames_note(counts: Counts) -> str | None:
    """The note for names that look like those of frames, or None."""
    sequences = {} if counts.photos else sequences_in(counts.names)
    if not sequences:
        return None
    name, most = max(sequences.items(), key=lambda item: item[1])
    alike = neighbour_correlation(*counts.rows)
    correlation = "" if alike is None else f"; neighbours' differences correlate by {alike:.2f}"
    return (
        f"the names are numbered ({most} begin with {cut(printable(name))!r}){correlation}. If these are frames of "
        "videos, the interval is too narrow and p too small: give --blocks sequence, or --blocks N"
    )


def _block_notes(paired: Paired, request: Request) -> list[str]:
    if request.blocks is None or paired.blocks >= ROUGH:
        return []
    if paired.blocks < FEW:
        return [f"{paired.blocks} blocks cannot show a difference at 5 %: {FEW} or more are needed"]
    return [f"{paired.blocks} blocks: the interval is rough with fewer than {ROUGH}"]


# ---- printing ----------------------------------------------------------------------------------------------------
def print_test(report: Mapping[str, Any]) -> None:
    """Prints the table and the words on stdout, the notes on stderr."""

    def cells(row: Mapping[str, Any], p: float | None) -> list[str]:
        interval = row["interval"]
        return [
            *("–" if row[side] is None else f"{row[side]:.2f}" for side in ("a", "b")),
            "–" if row["difference"] is None else f"{row['difference']:+.2f}",
            "–" if interval is None else f"{interval['low']:+.2f} to {interval['high']:+.2f}",
            "–" if p is None else f"{p:.2g}",
            "–" if row["smallest"] is None else f"{row['smallest']:.2f}",
        ]

    mean, classes = report["mIoU"], report["classes"]
    order = sorted(classes, key=lambda row: (row["p"] is None, row["p"]))[:MOST_CLASSES]
    rows = [("mIoU", *cells(mean, mean["p"])), *((row["name"], *cells(row, row["holm"])) for row in order)]
    blocks = report["blocks"]
    over = f"{report['images']} images"
    if blocks["rule"] is not None:
        over += f" in {blocks['count']} blocks of up to {blocks['largest']}"
    left = f", {len(order)} of {len(classes)} classes" if len(order) < len(classes) else ""
    title = f"IoU [%] on {over}{left}"
    print_table(("IoU [%]", "A", "B", "B − A", f"{LEVEL:g} % interval", "p", "smallest"), rows, title)
    for side in "ab":
        echo(f"{side.upper()}: {report[side]['file']}: {report[side]['what']}")
    echo(report["verdict"])
    echo(class_verdict(classes))
    ways = "all" if report["permutations"]["all"] else f"{report['permutations']['count']} random"
    unit = "images" if blocks["rule"] is None else "blocks"
    echo(
        f"p: permutation test, {ways} ways to swap whole {unit} between A and B, of classes with Holm's correction; "
        f"interval: paired bootstrap, {report['resamples']} resamples; smallest: difference found in "
        f"{100 * report['power']:g} of 100 cases"
    )
    protocol = "" if report["protocol"] is None else f"; protocol of networks: {report['protocol']}"
    echo(f"{report['split']} split of recipe {report['recipe']}{protocol}; not counted: pixels with label 255")
    for note in report["notes"]:
        echo(f"note: {note}", err=True)
