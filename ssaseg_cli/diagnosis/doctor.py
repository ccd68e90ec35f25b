"""`ssaseg doctor`: looks at everything, prints it, and says what is wrong and how to fix it."""

import sys
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from ssaseg.cli.console import json_target, write_json
from ssaseg.cli.diagnosis.finding import Finding, Report, one_line, without_names
from ssaseg.cli.diagnosis.machine import look_at_gpus, look_at_machine, look_at_threads
from ssaseg.cli.diagnosis.networks import look_at_networks
from ssaseg.cli.diagnosis.software import look_at_extras, look_at_software
from ssaseg.cli.diagnosis.storage import look_at_folders
from ssaseg.cli.printing import echo

WIDTH = 100  # characters of a line


def run_doctor(json_out: str | None, device: str) -> int:
    """Prints the report, and writes it as JSON. Returns 0, or 1 where something is broken.

    Raises CommandError for a `json_out` that cannot be written.
    """
    target = json_target(json_out)
    findings: list[Finding] = []
    sections = {name: found for name, found in _look(device, findings.append).items() if found}
    verdict = [each._asdict() for each in sorted(findings, key=lambda each: not each.broken)]
    broken = any(each.broken for each in findings)
    report: dict[str, Any] = without_names({**sections, "findings": verdict, "well": not broken})
    write_json(target, report)
    if target != "-":
        for name in sections:
            echo(section_text(name, report[name]))
        echo(verdict_text(report["findings"]))
    return int(broken)


def _look(device: str, report: Report) -> dict[str, dict[str, Any]]:
    """All sections by name. An error of the doctor itself does not hide what others find."""
    looks: dict[str, Callable[[], dict[str, Any]]] = {
        "software": lambda: look_at_software(report),
        "machine": lambda: look_at_machine(report),
        "threads and memory": lambda: look_at_threads(report),
        "GPU": lambda: look_at_gpus(report),
        "folders": lambda: look_at_folders(report),
        "extras": lambda: look_at_extras(report),
        "networks": lambda: look_at_networks(device, report, _progress),
    }
    sections: dict[str, dict[str, Any]] = {}
    for name, look in looks.items():
        try:
            sections[name] = look()
        except Exception as error:
            report(Finding(f"{name}: this part of the doctor failed: {one_line(error)}", "report it"))
    return sections


def _progress(name: str) -> None:
    """On a terminal the name of the network that is tried, for those who wait."""
    if sys.stderr.isatty():
        echo(f"\rtrying {name:30}", err=True, nl=False)


def section_text(name: str, values: Mapping[str, Any]) -> str:
    """A section as aligned lines."""
    wide = max(map(len, values), default=0)
    lines = [
        textwrap.fill(
            str(value),
            WIDTH,
            initial_indent=f"  {key:{wide}}  ",
            subsequent_indent=" " * (wide + 4),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for key, value in values.items()
    ]
    return "\n".join([name, *lines, ""])


def verdict_text(findings: list[dict[str, Any]]) -> str:
    """What is wrong, with its fix, and the sum of it."""
    lines = [f"{'problem' if each['broken'] else 'note'}: {each['what']}\n  fix: {each['fix']}" for each in findings]
    problems = sum(each["broken"] for each in findings)
    notes = len(findings) - problems
    said = f"{notes} note{'s' * (notes != 1)}" if notes else ""
    last = f"{problems} problem{'s' * (problems != 1)}" if problems else "all is well"
    return "\n".join([*lines, ", ".join(filter(None, (last, said)))])
