"""Prints a report on stdout: the table of one file, or several files side by side."""

from collections.abc import Mapping
from typing import Any

from ssaseg.cli.console import print_table
from ssaseg.cli.evaluation.confused import most_confused
from ssaseg.cli.evaluation.several import MEANS, print_several, state_calibration
from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.metrics import Interval


def print_any(report: Mapping[str, Any]) -> None:
    """Prints a report of one file or of several on stdout."""
    (print_several if "models" in report else print_report)(report)


def print_calibration(found: Mapping[str, Any]) -> None:
    """Prints the calibration error and the reliability of each bin."""
    rows = [
        (f"{each['from']:.1f} to {each['to']:.1f}", *(f"{each[key]:.2f}" for key in ("confidence", "accuracy")), share)
        for each in found["bins"]
        if each["pixels"]
        for share in (f"{100 * each['pixels'] / found['pixels']:.2f}",)
    ]
    print_table(("confidence [%]", "mean [%]", "right [%]", "pixels [%]"), rows)
    echo(state_calibration(found))


def print_report(report: Mapping[str, Any]) -> None:
    """Prints the table per class, the means, the interval of the mIoU, the speed and the protocol on stdout."""

    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    shown = {"IoU": "IoU [%]", "BoundaryIoU": "boundary [%]", "Acc": "Acc [%]", "Dice": "Dice [%]"}
    shown = {key: head for key, head in shown.items() if key in report["classes"][0]} | {"pixel_share": "pixels [%]"}
    rows = [(row["name"], *(cell(row[key]) for key in shown), row["remark"]) for row in report["classes"]]
    step = "" if report["step"] is None else f", step {report['step']}"
    title = f"{report['checkpoint']}: {report['model']} {report['classifier']}{step}"
    print_table(("class", *shown.values(), ""), rows, title)
    means = "   ".join(f"{key} {cell(report[key])} %" for key in MEANS if key in report)
    echo(f"{means}   (always the most common class: mIoU {cell(report['majority_miou'])} %)")
    print_interval(report)
    echo(most_confused(report["confused"], 5))
    if "calibration" in report:
        print_calibration(report["calibration"])
    echo(f"{report['images_per_s']:.1f} images/s, including reading and scoring")
    echo(f"protocol: {report['statement']}")


def print_interval(report: Mapping[str, Any], whose: str = "") -> None:
    """The interval of the mIoU on stdout, if it is known; whose: what the line says before how it was computed."""
    if report["mIoU_interval"] is None:
        return
    interval = Interval(**report["mIoU_interval"])
    how = f"{whose}percentile bootstrap over {report['images']} images, {interval.resamples} resamples"
    echo(f"mIoU {interval.level:g} % interval {interval.low:.2f} to {interval.high:.2f} % ({how})")
