"""Random files and command lines, from a seed, against what reads them: `make fuzz`, and a short run in the tests.

Whatever comes from outside must end in a result or in one error of at most three lines. Here that is: the reader
returns, or raises what `print_error` prints in three lines; within seconds, within `MEMORY`, and without running what
the file asks for. Each kind runs in a process of its own, so that a crash is noticed and its input is kept.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from forked import Forked
from fuzz_targets import TARGETS, Target

from ssaseg.cli.errors import print_error

MEMORY = 2**30  # bytes of addresses that all inputs of a kind may need beyond what is there before
PATIENCE = 10  # seconds for one input
FAILURES = 12  # at different places, that are reported


class Hang(BaseException):
    """An input took longer than `PATIENCE`."""


def run(kind: str, seed: int, count: int, seconds: float, folder: Path) -> None:
    """Tries inputs until there were `count`, or the time is over; writes `folder`/report.json.

    `folder`/input holds the input that is being tried: after a crash, the one that caused it.
    """
    target = TARGETS[kind](folder)
    with (folder / "crash.txt").open("w") as crash:
        faulthandler.enable(crash)
        _limit_memory()
        signal.signal(signal.SIGALRM, _hang)
        found: Counter[str] = Counter()
        failures: dict[str, str] = {}  # place -> the first one there
        outcome, failure = attempt(target, target.whole)
        if outcome != "result":
            failures["whole"] = f"{kind}: an unchanged input ended in {outcome} {failure}"
        slowest, began = 0.0, time.monotonic()
        for number in range(count):
            if time.monotonic() - began > seconds:
                break
            content = target.make(random.Random(f"{kind} {seed} {number}"))
            (folder / "input").write_bytes(content)
            started = time.monotonic()
            outcome, failure = attempt(target, content)
            slowest = max(slowest, time.monotonic() - started)
            found[outcome] += 1
            place = "".join([line for line in failure.split("\n") if line.startswith("  File")][-1:]) or failure
            if failure and place not in failures and len(failures) < FAILURES:
                failures[place] = f"{kind}, seed {seed}, input {number}: {failure}"
                (folder / f"failed-{number}").write_bytes(content)
    report = {"kind": kind, "seed": seed, "found": found, "failures": [*failures.values()]}
    (folder / "report.json").write_text(json.dumps(report | {"slowest_s": round(slowest, 2)}))


def attempt(target: Target, content: bytes) -> tuple[str, str]:
    """What became of one input, and what was wrong with that ("": nothing)."""
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        target.read(content)
        outcome, wrong = "result", ""
    except Hang:
        return "hang", traceback.format_exc()
    except Exception as error:
        outcome, wrong = type(error).__name__, _printed(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if target.marker.exists():
        return "code was run", str(target.marker)
    return outcome, wrong


def _printed(error: Exception) -> str:
    """ "" if the command prints this error in at most three lines without codes; otherwise what is wrong."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            print_error(error)
    except Exception:
        return "".join(traceback.format_exception(error))
    lines = shown.getvalue().split("\n")[:-1]
    if len(lines) > 3 or "\x1b" in shown.getvalue():
        return f"printed as {lines!r}"
    return ""


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    if pages is not None:
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _hang(*_: object) -> None:
    raise Hang


def fuzz(kind: str, seed: int, count: int, seconds: float, folder: Path) -> dict[str, Any]:
    """The report of `run` in a process of its own. A crash is a failure too, and so is a process that never ends."""
    folder.mkdir(parents=True, exist_ok=True)
    process = Forked(run, kind, seed, count, seconds, folder, errors=folder / "errors.txt")
    code = process.wait(seconds + 60)
    if code == 0 and (folder / "report.json").exists():
        report: dict[str, Any] = json.loads((folder / "report.json").read_text())
        return report
    errors = (folder / "errors.txt").read_text() if (folder / "errors.txt").exists() else ""
    crash = (folder / "crash.txt").read_text() if (folder / "crash.txt").exists() else ""
    failure = f"{kind}, seed {seed}: the process ended with {code}; its input is {folder / 'input'}\n{crash}{errors}"
    return {"kind": kind, "seed": seed, "found": {"crash": 1}, "failures": [failure], "slowest_s": 0.0}


def main() -> int:
    parser = argparse.ArgumentParser(description="Random files and command lines against what reads them.")
    parser.add_argument("--seconds", type=float, default=60, help="for each kind")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--kind", choices=sorted(TARGETS), action="append", help="all, unless given")
    parser.add_argument("--keep", type=Path, help="folder for the inputs that failed")
    given = parser.parse_args()
    folder = given.keep or Path(tempfile.mkdtemp(prefix="ssaseg-fuzz-"))
    failed = 0
    for kind in given.kind or sorted(TARGETS):
        report = fuzz(kind, given.seed, sys.maxsize, given.seconds, folder / kind)
        found = Counter(report["found"])
        shown = ", ".join(f"{name} {count:,}" for name, count in found.most_common())
        print(f"{kind}: {sum(found.values()):,} inputs: {shown}; slowest {report['slowest_s']} s", flush=True)
        for failure in report["failures"]:
            print(failure, flush=True)
        failed += len(report["failures"])
    print(f"seed {given.seed}: {failed or 'no'} failures; inputs below {folder}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
