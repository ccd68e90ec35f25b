"""One network with every classifier: the same recipe, seed and steps; scores and costs in one table.

    python benchmarks/compare_classifiers.py demo train.steps=300                   # the demo's scenes, minutes
    python benchmarks/compare_classifiers.py camvid-seaformer_s-ssa data.root=data/camvid train.steps=500 train.batch=4
    python benchmarks/compare_classifiers.py --smoke    # a row of the demo's scenes, quick, writes nothing

Words after the recipe are key=value arguments of `ssaseg train`. Each row is one training with `ssaseg train`, and
`ssaseg eval --boundary` of its last checkpoint; a run that was stopped continues, one that is complete is used. Rows
with "alone" have the same two losses where they exist, the cross entropies of final and of coarse logits: the papers
change classifier and losses together. Prints the table as Markdown and writes
benchmarks/results/compare_classifiers-RECIPE.json.

Minutes are those of the processor, in training with its evaluations; they depend less on other programs than the clock.
Memory is the peak of the training process. Inference, parameters and multiply-accumulates are `ssaseg profile`'s.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ssaseg.models import CLASSIFIERS

RESULTS = Path(__file__).parent / "results"
SMALL = ["train.steps=2", "data.synthetic.train=16", "data.synthetic.val=2", "train.workers=0"]
CROSS_ENTROPIES_ALONE = {
    "cac": ["teacher_ce", "response"],
    "ssa": ["teacher_ce", "main_dice", "teacher_dice", "response", "semantic", "spatial"],
}
# Row → (classifier, key=value arguments).
ROWS: dict[str, tuple[str, list[str]]] = {
    **{name: (name, []) for name in ("linear", "ssa", "cac", "protoseg", "gmmseg", "dnc")},
    **{
        f"{name} alone": (name, [f"loss.weights.{loss}=0" for loss in losses])
        for name, losses in CROSS_ENTROPIES_ALONE.items()
    },
}


def ssaseg(*words: str, log: Path) -> tuple[float, float]:
    """Runs a command of ssaseg, its output into `log`. Returns processor time [s] and peak memory [MiB]."""
    with log.open("a") as out:
        process = subprocess.Popen([sys.executable, "-m", "ssaseg", *words], stdout=out, stderr=out)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"ssaseg {' '.join(words)}: exit {process.returncode}\nsee {log}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def measure(row: str, recipe: str, words: list[str], folder: Path) -> dict[str, Any]:
    """Trains and scores one row in `folder`; a complete result there is returned as it is."""
    classifier, own = ROWS[row]
    done, run, log = folder / "row.json", folder / "run", folder / "log.txt"
    asked = [recipe, *words, f"model.classifier={classifier}", *own]
    if done.exists():
        found = json.loads(done.read_text())
        if found["asked"] != asked:
            raise SystemExit(f"{done}: of {' '.join(found['asked'])}\nchoose another --out, or delete it")
        return found
    folder.mkdir(parents=True, exist_ok=True)
    costs = folder / "costs.json"  # of the parts of a run that was stopped
    spent = json.loads(costs.read_text()) if costs.exists() else []
    resume = ["--resume"] if any(run.glob("state-*.pt")) else []
    command = ["train", *asked, "--out", str(run), *resume]
    spent.append(ssaseg(*command, log=log))
    costs.write_text(json.dumps(spent))
    checkpoint = str(run / "last.safetensors")
    ssaseg("eval", checkpoint, "--boundary", "--json", str(folder / "eval.json"), log=log)
    ssaseg("profile", checkpoint, "--runs", "10", "--json", str(folder / "profile.json"), log=log)
    scores = json.loads((folder / "eval.json").read_text())
    (column,) = json.loads((folder / "profile.json").read_text())["columns"]
    found = {
        "row": row,
        "asked": asked,
        "mIoU": scores["mIoU"],
        "interval": [scores["mIoU_interval"][key] for key in ("low", "high")],
        "boundary mIoU": scores["mBoundaryIoU"],
        "aAcc": scores["aAcc"],
        "IoU": {each["name"]: each["IoU"] for each in scores["classes"]},
        "training [processor min]": sum(seconds for seconds, _ in spent) / 60,
        "training peak [MiB]": max(peak for _, peak in spent),
        "inference [ms]": column["network_ms"]["p50"],
        "parameters [M]": column["parameters_deployed"] / 1e6,
        "memory of pixels [MiB]": column["memory_mib"],
    }
    done.write_text(json.dumps(found, indent=1))
    return found


def note(row: str) -> str:
    """What must be said with the classifier's name."""
    said = CLASSIFIERS[ROWS[row][0]].NOTE
    return f" ({said})" if said else ""


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| classifier | mIoU | 95 % interval | boundary mIoU | aAcc | training [processor min] | peak [MiB] | "
        "inference [ms] | parameters [M] | memory of pixels [MiB] |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["interval"]
        name = row["row"] + note(row["row"])
        lines.append(
            f"| {name} | {row['mIoU']:.2f} | {low:.1f} to {high:.1f} | {row['boundary mIoU']:.1f} | "
            f"{row['aAcc']:.1f} | {row['training [processor min]']:.1f} | {row['training peak [MiB]']:.0f} | "
            f"{row['inference [ms]']:.1f} | {row['parameters [M]']:.2f} | {row['memory of pixels [MiB]']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Trains what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS), metavar="ROW", help="default: all rows")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_classifiers"), help="folder of the runs")
    parser.add_argument("--smoke", action="store_true", help="small and quick; writes nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.smoke:
            arguments.out, arguments.words, arguments.only = Path(temporary), SMALL, ["dnc"]
        folder = arguments.out / Path(arguments.recipe).stem
        rows = [
            measure(row, arguments.recipe, arguments.words, folder / row.replace(" ", "-")) for row in arguments.only
        ]
    print(table(rows))
    if not arguments.smoke:
        report = {
            "command": " ".join(["python", "benchmarks/compare_classifiers.py", *sys.argv[1:]]),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "on": f"{platform.machine()}, {os.cpu_count()} cores",
            "threads": torch.get_num_threads(),
            "rows": rows,
        }
        path = RESULTS / f"compare_classifiers-{Path(arguments.recipe).stem}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
