"""`ssaseg compare`: curves of runs, and a test of two sides, as far as either is possible with what was given."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssaseg.cli.comparison.compare import Run, compare_runs
from ssaseg.cli.comparison.sides import RUN, Request, Side, side_of
from ssaseg.cli.console import json_target, write_json
from ssaseg.cli.errors import USER_ERRORS, CommandError
from ssaseg.cli.printing import echo
from ssaseg.files.text import describe


def run_compare(paths: Sequence[Path], out: Path | None, json_out: str | None, request: Request | None) -> int:
    """Compares what `paths` name: runs by their curves, and two of anything by a test whether they differ.

    out: the picture of runs; None: compare.png. request: of the test; None: without it. json_out: a file for the
    report; "-": stdout, without the tables. Returns 0, or 1 where some of several folders are not run folders. Raises
    CommandError where nothing can be compared, what `compare_runs` raises, and what the test raises, unless it is of
    two runs and was not asked for.
    """
    json_out = json_target(json_out)
    sides = [side_of(path, ".png" if request is None else request.reading["suffix"]) for path in paths]
    if all(side is None or side.kind == RUN for side in sides):
        distinct = len({os.path.realpath(side.path) for side in sides if side is not None})
        if request is not None and request.asked and distinct != 2:
            what = "leave out --data, --blocks and the other options of the test"
            raise CommandError(f"compare: a test is of two runs; got {distinct}\n{what}")
        report, read = compare_runs(paths, Path("compare.png") if out is None else out, json_out)
        report["test"] = None if request is None or len(read) != 2 else _test_runs(read, request)
        whole = len(read) == len({os.path.realpath(path) for path in paths})
    else:
        known = require_two(paths, sides)
        if out is not None:
            raise CommandError(f"--out {out}: curves are drawn of runs only\nleave it out, or give folders of runs")
        if request is None:
            raise CommandError("--no-test: files and folders of labels can only be tested\nleave it out")
        report, whole = {"test": _test(known, request)}, True
    if report["test"] is not None or json_out == "-":
        write_json(json_out, report)
    if report["test"] is not None and json_out != "-":
        from ssaseg.cli.comparison.difference import print_test

        print_test(report["test"])
    return 0 if whole else 1


def require_two(paths: Sequence[Path], sides: Sequence[Side | None]) -> list[Side]:
    """The two sides of a test. Raises CommandError for another number, and for a path that is none."""
    for path, side in zip(paths, sides, strict=True):
        if side is None:
            found = "holds no run, network or label PNGs" if path.exists() else "no such file or folder"
            kinds = "a folder that `ssaseg train` wrote, a file that `ssaseg eval` takes, or a folder of label PNGs"
            raise CommandError(f"{path}: {found}\nexpected {kinds}")
    if len(sides) != 2:
        raise CommandError(
            f"compare: got {len(sides)} files or folders of labels; expected two, A and B\n"
            "`ssaseg eval` scores several files side by side; `ssaseg compare` draws curves of any number of runs"
        )
    return [side for side in sides if side is not None]


def _test_runs(runs: Sequence[Run], request: Request) -> dict[str, Any] | None:
    """The test of two runs; None, with the reason on stderr, if it was not asked for and is not possible."""
    sides = [side for run in runs if (side := side_of(run.folder, "")) is not None]
    try:
        return _test(sides, request)
    except Exception as error:
        known = isinstance(error, CommandError | OSError) or any(t.__name__ in USER_ERRORS for t in type(error).__mro__)
        if request.asked or not known:
            raise
        first, *_ = describe(error).splitlines()
        echo(f"note: no test whether the runs differ: {first}", err=True)
        return None


def _test(sides: Sequence[Side], request: Request) -> dict[str, Any]:
    if missing := [side.path for side in sides if side.file is None]:
        fix = "a run can be tested after its first evaluation"
        raise CommandError(f"{missing[0]}: has no best.safetensors or last.safetensors\n{fix}")
    from ssaseg.cli.comparison.difference import test_sides  # imports torch

    return test_sides(sides, request)
