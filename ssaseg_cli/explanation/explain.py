"""`ssaseg explain`: goes through the images once, draws some of them, and writes the figures of all."""

import difflib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from ssaseg.cli.console import progress_bar
from ssaseg.cli.device import select_device
from ssaseg.cli.errors import CommandError
from ssaseg.cli.evaluation.report import require_labels
from ssaseg.cli.explanation import items, summary
from ssaseg.cli.explanation.figures import figures
from ssaseg.cli.explanation.pictures import Artist
from ssaseg.cli.explanation.probing import Probe, open_probe
from ssaseg.cli.explanation.sums import Sums, edge_distance
from ssaseg.cli.prediction.preparing import make_folders
from ssaseg.cli.prediction.skipping import Skips, skip_reason
from ssaseg.cli.prediction.sources import EXPLANATIONS, find_sources
from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.limit import memory_limit
from ssaseg.cli.signals import StopSignal
from ssaseg.datasets import default_palette
from ssaseg.datasets.bands.reading import shown
from ssaseg.files.text import printable
from ssaseg.files.writing import write_atomic

ACTIVATION, SUMMARY = EXPLANATIONS  # folders below OUT
AGAIN = "run the command again"


def run_explain(
    checkpoint: Path,
    images: Sequence[str],
    out: Path,
    against: Path | None,
    classes: Sequence[str],
    masks: Path | None,
    data: str | None,
    root: Path | None,
    split: str,
    limit: int | None,
    pictures: int,
    device: str,
) -> int:
    """Explains `images`, or without them a split of the recipe's data. Returns 0, or 1 if an image was skipped or could
    not be drawn.

    Arguments as in the help. Pictures of images of an earlier run stay unless the same image is drawn again. After
    Ctrl-C or SIGTERM the report is of the images so far; returns 130 or 143; a second signal ends the process. Raises
    CommandError for unknown classes, a second checkpoint of other classes, inputs without images, labels that are all
    ignored, and an `out` that cannot be written; and what loading checkpoints and data raises.
    """
    sources = find_sources(images, out)  # a missing one is an error now, not after the network is read
    chosen = select_device(device)
    probe = open_probe(checkpoint, chosen)
    names = list(probe.metadata["classes"])
    drawn = [class_index(name, names) for name in dict.fromkeys(classes)]
    other = None if against is None else open_probe(against, chosen)
    if other is not None:
        require_equal_classes(probe, other)
    if images:
        found = items.of_files(sources, masks, checkpoint, probe.metadata, data)
    else:
        found = items.of_split(checkpoint, probe.metadata, data, root, split)
    make_folders(out, EXPLANATIONS)
    work = Work(probe, other, found.labels is not None, out, drawn, pictures)
    wanted = found.items[:limit]
    with StopSignal(hasty=True) as stop, memory_limit() if chosen.type == "cpu" else nullcontext():  # CUDA: see predict
        work.go_through(wanted, stop)
    sums = work.sums
    if stop.requested:
        echo(f"stopped: {sums.images} of {len(wanted)} images are explained", err=True)
        if not sums.pixels.any():
            return stop.exit_code
    if not sums.images:
        raise CommandError(f"none of the {len(wanted)} images could be used\nthe reasons are printed above")
    if found.labels is not None:
        require_labels(sums.confusion["final"], f"{printable(found.labels)} ({summary.count(sums.images)})")
    left_out = missing_parts(probe, other, sums.known)
    report = {
        **probe.facts(),
        "against": None if other is None else other.facts(),
        "labels": found.labels or "predicted by the checkpoint: nothing is known to be right or wrong",
        "of_images": len(wanted),
        "skipped": work.skipped,
        "pictures": work.drawn,
        "left_out": left_out,
        "classifiers": work.captions,
        **figures(sums, names),
    }
    content = json.dumps(report, indent=1, allow_nan=False).encode()
    write_atomic(out / "explain.json", content, sync=False, root=out)
    summary.draw(report, work.captions, out / SUMMARY)
    for line in (*left_out, *notes(probe, other)):
        echo(f"note: {line}", err=True)
    summary.print_summary(report, work.captions)
    echo(f"wrote {printable(str(out))}: explain.json, {SUMMARY}/, {ACTIVATION}/ ({summary.count(len(work.drawn))})")
    return stop.exit_code if stop.requested else int(bool(work.skipped or work.not_drawn))


class Work:
    """Goes through the images: looks at each with all classifiers, adds to the sums, and draws the first ones."""

    def __init__(
        self, probe: Probe, other: Probe | None, known: bool, out: Path, classes: Sequence[int], pictures: int
    ) -> None:
        self.probe, self.other, self.out, self.pictures = probe, other, out, pictures
        self.drawn: list[str] = []  # pictures, as paths below `out`
        self.skips = Skips()
        self.skipped = self.not_drawn = 0  # images that are not in the sums; images whose picture could not be written
        self.captions = captions(probe, other)
        names = probe.metadata["classes"]
        comparisons = [(first, "final") for first in self.captions if first != "final"]
        self.sums = Sums(len(names), list(self.captions), comparisons, known)
        palette = probe.metadata["palette"] or default_palette(names)
        self.artist = Artist(names, palette, self.captions, comparisons, classes)

    def go_through(self, wanted: Sequence[items.Item], stop: StopSignal) -> None:
        """All images, until a request to stop. Images that are skipped are reported."""
        with self.skips, progress_bar(len(wanted), "explained") as advance:
            for item in wanted:
                try:
                    picture = self.explain(item)
                except Exception as error:
                    self.skips.add(skip_reason(error, item.path, again=AGAIN))
                    self.skipped += 1
                else:
                    self.write(item, picture)
                advance(1)
                if stop.requested:
                    return

    def explain(self, item: items.Item) -> bytes | None:
        """Adds one image to the sums. Returns its picture, a PNG; None if enough are drawn."""
        image, labels = item.read()
        seen = self.probe.look(image, str(item.path))
        stages = {} if seen.coarse is None else {"coarse": seen.coarse}
        stages["final"] = seen.final
        if self.other is not None:
            stages["against"] = self.other.look(image, str(item.path)).final
        masks = seen.final.labels if labels is None else labels
        distance = edge_distance(masks)
        picture = None
        if len(self.drawn) < self.pictures:
            picture = self.artist.draw(item.name, shown(image), labels, stages, distance, seen.prototypes)
        self.sums.add(stages, masks, distance, seen.prototypes)  # last: an image that is skipped is not counted
        return picture

    def write(self, item: items.Item, picture: bytes | None) -> None:
        """Writes the picture of an image, or reports why it cannot be written, for this image alone."""
        if picture is None:
            return
        root, name = self.out / ACTIVATION, f"{item.name}.png"
        try:
            write_atomic(root / name, picture, sync=False, root=root)
        except Exception as error:
            echo(f"no picture: {skip_reason(error, item.path, writing=True)}", err=True)
            self.not_drawn += 1
        else:
            self.drawn.append(f"{ACTIVATION}/{name}")


def captions(probe: Probe, other: Probe | None) -> dict[str, str]:
    """The classifiers by their key in the report, in the order in which they are drawn, as text for a reader."""
    found = {"coarse": f"coarse ({probe.classifier})"} if probe.adapts else {}
    found["final"] = f"adapted ({probe.classifier})" if probe.adapts else probe.classifier
    if other is not None:
        found["against"] = f"against: {other.classifier}"
    return found


def class_index(name: str, classes: Sequence[str]) -> int:
    """Number of a class. Raises CommandError for a name that does not exist; it names close matches."""
    if name in classes:
        return classes.index(name)
    folded = {each.casefold(): each for each in classes}
    near = difflib.get_close_matches(name.casefold(), folded, n=3)
    listed = ", ".join(printable(each) for each in classes[:20]) + (", …" if len(classes) > 20 else "")
    raise CommandError(
        f"--class {printable(name)}: no such class\nexpected one of {listed}\n"
        + (f"did you mean {' or '.join(printable(folded[each]) for each in near)}?" if near else "correct the name")
    )


def require_equal_classes(probe: Probe, other: Probe) -> None:
    """Raises CommandError unless both checkpoints have the same classes in the same order, and read the same images."""
    channels = [each.model.channels for each in (probe, other)]
    if channels[0] != channels[1]:
        raise CommandError(
            f"{other.path}: for images of {channels[1]} channels; {probe.path}: {channels[0]} channels\n"
            "give --against a checkpoint for the same images"
        )
    ours, theirs = probe.metadata["classes"], other.metadata["classes"]
    if list(ours) == list(theirs):
        return
    fix = "give --against a checkpoint with the classes of CHECKPOINT, in the same order"
    if len(ours) != len(theirs):
        raise CommandError(f"{other.path}: {len(theirs)} classes; {probe.path}: {len(ours)} classes\n{fix}")
    index = next(k for k in range(len(ours)) if ours[k] != theirs[k])
    raise CommandError(f"{other.path}: class {index} is {theirs[index]!r}; {probe.path}: {ours[index]!r}\n{fix}")


def missing_parts(probe: Probe, other: Probe | None, known: bool) -> list[str]:
    """What the report and the pictures do not have, and why."""
    lines = []
    if not probe.adapts:
        alone = "" if other else ", and without --against there is nothing to compare it with"
        lines.append(f"left out: before and after adaptation: classifier {probe.classifier} does not adapt{alone}")
    if probe.missing:
        lines.append(f"left out: {' and '.join(probe.missing)} prototypes: {probe.classifier} has none that adapt")
    if not known:
        lines.append("left out: better and worse, confused pairs: there are no labels; masks are the predicted ones")
    return lines


def notes(probe: Probe, other: Probe | None) -> list[str]:
    """What differs from `ssaseg eval`."""
    changed = [each for each in (probe, other) if each is not None and each.changed]
    return [
        f"{printable(str(each.path))}: its protocol has windows, several scales or mirrored images; here "
        "an image is one input"
        for each in changed
    ]
