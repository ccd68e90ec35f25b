"""Several files in one `ssaseg eval`: whether they can be compared, their differences, and one table of all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssaseg.cli.console import print_table
from ssaseg.cli.engine.opening import Opened
from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.evaluate import Sums
from ssaseg.cli.scoring.inference import state_views
from ssaseg.cli.scoring.metrics import Interval, difference_interval
from ssaseg.files.text import printable
from ssaseg.recipes import parse_protocol

MEANS = ("mIoU", "mBoundaryIoU", "fwIoU", "aAcc", "mAcc")  # those that are printed; a report has more


def require_one_set_of_classes(opened: Sequence[Opened]) -> None:
    """Raises CommandError if class k of one file is another class in the first: their scores could not be compared."""
    first, *others = opened
    ours = first.metadata["classes"]
    for other in others:
        theirs = other.metadata["classes"]
        at = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if at is not None:
            differ = f"class {at} is {theirs[at]!r}; {first.path}: {ours[at]!r}"
        elif len(ours) != len(theirs):
            differ = f"{len(theirs)} classes; {first.path}: {len(ours)} classes"
        else:
            continue
        raise CommandError(
            f"{printable(str(other.path))}: {differ}\n"
            "expected files with the same classes in the same order, to compare their scores\n"
            "score files of other classes by commands of their own"
        )


def note_what_differs(opened: Sequence[Opened], protocols: bool) -> None:
    """Prints for each file what it was trained for that the first file was not, and what is used, on stderr.

    protocols: whether the files' own protocols are used, not that of a recipe.
    """
    first, *others = opened
    for other in others:
        name = printable(str(other.path))
        ours, theirs = (parse_protocol(each.metadata["protocol"], f"{each.path}: protocol") for each in (first, other))
        if protocols and ours != theirs:
            used = f"used for all: that of {first.path}"
            echo(f"{name}: its protocol is another: {state_views(theirs)}; {used}", err=True)
        if any(first.metadata[key] != other.metadata[key] for key in ("mean", "std")):
            echo(f"{name}: its mean and std are others than those of {first.path}; each file's own are used", err=True)
        if first.metadata.get("range") != other.metadata.get("range"):
            echo(f"{name}: its range of 16-bit images is another; used for all: data.range of the recipe", err=True)


def differences(files: Sequence[Path | str], tallies: Sequence[Sums]) -> list[dict[str, Any]]:
    """For each file but the first: how its score [points] and its labels [%] differ from those of the first."""
    first, *others = tallies
    base = first.confusion.scores()["mIoU"]
    found = []
    for path, tally in zip(files[1:], others, strict=True):
        interval = difference_interval(first.confusion, tally.confusion)
        found.append(
            {
                "checkpoint": str(path),
                "against": str(files[0]),
                "mIoU": tally.confusion.scores()["mIoU"] - base,
                "mIoU_interval": None if interval is None else interval._asdict(),
                "equal_labels": 100 * int(tally.equal) / max(tally.pixels, 1),
            }
        )
    return found


def print_several(report: Mapping[str, Any]) -> None:
    """Prints IoU per class and the means of all files side by side, and how the others differ from the first."""
    models = report["models"]
    names = short_names([each["checkpoint"] for each in models])

    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    rows = [
        (row["name"], *(cell(each["classes"][index]["IoU"]) for each in models))
        for index, row in enumerate(models[0]["classes"])
    ]
    rows += [(key, *(cell(each[key]) for each in models)) for key in MEANS if key in models[0]]
    print_table(("IoU [%]", *names), rows)
    for name, each in zip(names[1:], report["differences"], strict=True):
        interval = ""
        if each["mIoU_interval"] is not None:
            found = Interval(**each["mIoU_interval"])
            how = f"paired, over {models[0]['images']} images"
            interval = f" ({found.level:g} % interval {found.low:+.2f} to {found.high:+.2f}, {how})"
        equal = f"{each['equal_labels']:.3f} % of labels are equal"
        echo(f"{printable(name)} against {printable(names[0])}: mIoU {each['mIoU']:+.2f} points{interval}; {equal}")
    for name, each in zip(names, models, strict=True):
        echo(f"{printable(name)}: {each['model']} {each['classifier']}; {each['engine']}")
        if "calibration" in each:
            echo(f"{printable(name)}: {state_calibration(each['calibration'])}")
    echo(f"{models[0]['images_per_s']:.1f} images/s, including reading and scoring by all files")
    # Without the engine at its end, which was just printed.
    statements = [each["statement"].rpartition("; computed by ")[0] for each in models]
    for statement in dict.fromkeys(statements):
        whose = "protocol" if len(set(statements)) == 1 else f"protocol of {names[statements.index(statement)]}"
        echo(f"{whose}: {statement}")


def state_calibration(found: Mapping[str, Any]) -> str:
    """The calibration error of a report as one line of text."""
    error, confidence, accuracy = (found[key] for key in ("ECE", "confidence", "accuracy"))
    sure = "more" if confidence > accuracy else "less"
    means = f"mean confidence {confidence:.2f} %, right pixels {accuracy:.2f} %"
    return f"calibration error (ECE) {error:.2f} %; {means}: {sure} sure than right"


def short_names(files: Sequence[str]) -> list[str]:
    """The files' names without folders, where these differ; else the files as given, numbered if one is given twice."""
    names = [Path(file).name for file in files]
    names = names if len(set(names)) == len(names) else list(files)
    return names if len(set(names)) == len(names) else [f"{at}: {name}" for at, name in enumerate(names, start=1)]
