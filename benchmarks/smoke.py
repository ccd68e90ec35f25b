"""Runs every benchmark with --smoke, for CI: python benchmarks/smoke.py [NAME ...]

Each is a script in a process of its own, as with `python benchmarks/NAME.py --smoke`. These processes are forked from
one that has imported PyTorch, which takes longer than what most of them do. As many run at once as there are cores.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path

from ssaseg.cli.device import count_cores

OPTION = "--smoke"
# What most of them import. Nothing of it starts a thread, which a forked process would lack.
READY = (
    "cv2", "torch", "torch._dynamo", "ssaseg.cli.main", "ssaseg.cli.prediction.predict", "ssaseg.cli.scoring.evaluate",
    "ssaseg.cli.training.build", "ssaseg.cli.training.loop",
)  # fmt: skip
FORK = multiprocessing.get_context("fork")


def benchmarks() -> list[Path]:
    """The scripts beside this one that have the option."""
    here = Path(__file__).resolve()
    return [path for path in sorted(here.parent.glob("*.py")) if path != here and f'"{OPTION}"' in path.read_text()]


def run(script: Path, output: Path) -> None:
    """The script as `__main__` of this process; all that it prints goes to `output`."""
    with output.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = [str(script), OPTION]
    runpy.run_path(str(script), run_name="__main__")


def main(names: list[str]) -> int:
    """Exit code 1 if a benchmark failed; then what it printed is printed."""
    scripts = [path for path in benchmarks() if not names or path.stem in names]
    for name in READY:
        import_module(name)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        outputs = {script: Path(folder, f"{script.stem}.txt") for script in scripts}
        running: dict[int, tuple[multiprocessing.process.BaseProcess, Path]] = {}
        while scripts or running:
            while scripts and len(running) < count_cores():
                script = scripts.pop(0)
                process = FORK.Process(target=run, args=(script, outputs[script]))
                process.start()
                running[process.sentinel] = process, script
            for sentinel in wait(list(running)):
                process, script = running.pop(sentinel)  # type: ignore[index]
                process.join()
                print(f"benchmarks/{script.name} {OPTION}: exit code {process.exitcode}", flush=True)
                if process.exitcode:
                    failed = True
                    print(outputs[script].read_text(errors="replace"), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
