"""`ssaseg compare`: several runs in one table and one picture, with the differences of their recipes and data."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssaseg.cli.console import print_table, write_json
from ssaseg.cli.drawing import curves
from ssaseg.cli.drawing.bars import finish_bars, require_picture, save_figure, shorten
from ssaseg.cli.drawing.curves import Record, line
from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.training.environment import read_environment
from ssaseg.cli.training.log import hours_of, read_log
from ssaseg.recipes import RecipeError, load_recipe
from ssaseg.recipes.resuming import flat

MARK = {"Software": "ssaseg compare"}  # in the PNG file: only a picture with this mark is overwritten

MOST_CLASSES = 25  # classes in table and picture: those that differ most; the JSON has all classes

WIDEST = 90  # most letters of all run names together, as headers of a table

# Keys that have no influence on what is trained: only on folders, logging and speed.
NO_DIFFERENCE = {
    "name",
    "data.root",
    "data.cache",
    *(f"train.{key}" for key in ("workers", "prefetch", "keep", "log_every", "save_every")),
}


@dataclass
class Run:
    """The content of a run folder: records of metrics.jsonl, recipe keys, and IoU [%] by class at the best step."""

    name: str
    folder: Path
    records: list[Record]
    recipe: dict[str, Any]
    data: Any  # the fingerprint in env.json, None where there is none
    ious: dict[str, float | None] = field(default_factory=dict)
    damaged: int = 0  # lines of metrics.jsonl that are not records

    def figures(self) -> dict[str, Any]:
        """The row of the table, in the form of the JSON report; None where a value is not known."""
        logs, evaluations = curves.trained(self.records), curves.evaluated(self.records)
        best = curves.best_of(evaluations)
        last = evaluations[-1]["mIoU"] if evaluations else None
        speed = line(logs, "images_per_s").values
        return {
            "run": self.name,
            "folder": str(self.folder),
            "model": self.recipe.get("model.name"),
            "classifier": self.recipe.get("model.classifier"),
            "step": max([record["step"] for record in self.records], default=0),
            "steps": self.recipe.get("train.steps"),
            "best_mIoU": best[1] if best else None,
            "best_step": best[0] if best else None,
            "last_mIoU": last if isinstance(last, int | float) and np.isfinite(last) else None,
            "images_per_s": None if np.isnan(speed).all() else float(np.nanmedian(speed)),
            "hours": self.hours(),
        }

    def hours(self) -> float | None:
        """Time of training and evaluation, from the logged speeds, without starting, saving and lost steps."""
        return hours_of(self.records, self.recipe.get("train.batch"))


def compare_runs(folders: Sequence[Path], out: Path, json_out: str | None) -> tuple[dict[str, Any], list[Run]]:
    """Draws the curves of runs, and prints a table of them and their differences. Returns the report and the runs.

    json_out: a file for the report; "-": it is not written yet, and nothing is printed on stdout. Raises CommandError
    where none of the folders is a run folder, and where `out` is a file that this command did not write.
    """
    require_picture(out, MARK["Software"])
    read = open_runs(folders)
    rows = [run.figures() for run in read]
    differences = recipe_differences(read)
    notes = remarks(read, differences)
    classes = class_differences(read)
    draw(read, classes, out)
    report = {"runs": rows, "recipe_differences": differences, "classes": classes, "notes": notes}
    if json_out != "-":
        write_json(json_out, report)  # before printing, which may fail
        print_runs(rows, differences, classes)
    for note in notes:
        echo(f"note: {note}", err=True)
    echo(f"wrote {out}", err=json_out == "-")
    return report, read


# ---- reading -----------------------------------------------------------------------------------------------------
def open_runs(folders: Sequence[Path]) -> list[Run]:
    """Every run folder once, in the order given; warns about other folders. Raises CommandError if there is no run."""
    distinct = list({os.path.realpath(folder): folder for folder in reversed(folders)}.values())[::-1]
    missing = [folder for folder in distinct if not (folder / "metrics.jsonl").is_file()]
    expected = "expected folders that `ssaseg train` wrote"
    if len(missing) == len(distinct):
        reason = "no metrics.jsonl in it" if missing[0].is_dir() else "no such folder"
        raise CommandError(f"{missing[0]}: not a run folder ({reason})\n{expected}")
    for folder in missing:
        echo(f"warning: {folder}: not a run folder, ignored; {expected}", err=True)
    found = [folder for folder in distinct if folder not in missing]
    return [open_run(folder, name) for folder, name in zip(found, short_names(found), strict=True)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many last parts as are needed to make the names different."""
    parts = [Path(os.path.realpath(folder)).parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [os.path.join(*part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def open_run(folder: Path, name: str) -> Run:
    """Reads a run folder. If its recipe or env.json cannot be read, only their values are missing in the result."""
    config = folder / "config.yaml"
    recipe: dict[str, Any] = {}
    try:  # keys that are newer than the run get their default, which is what the run used
        recipe = flat(load_recipe(str(config)).model_dump(mode="json"))
    except (RecipeError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, RecipeError) else f"{config}: cannot be read"
        echo(f"warning: {reason}; model and recipe of {name} are not known", err=True)
    try:
        data = read_environment(folder / "env.json").get("data")
    except (OSError, ValueError):
        data = None
    records, damaged = read_log(folder / "metrics.jsonl")
    run = Run(name, folder, records, recipe, data, damaged=damaged)
    run.ious = best_ious(run)
    return run


def best_ious(run: Run) -> dict[str, float | None]:
    """IoU [%] by class at the best evaluation."""
    evaluations = curves.evaluated(run.records)
    best = curves.best_of(evaluations)
    if best is None:
        return {}
    found = next((record.get("IoU") for record in evaluations if record["step"] == best[0]), None)
    return found if isinstance(found, dict) else {}


# ---- differences -------------------------------------------------------------------------------------------------
def recipe_differences(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Keys whose value differs between runs, each with its value by name of the run."""
    known = [run for run in runs if run.recipe]
    keys = dict.fromkeys(key for run in known for key in run.recipe if key not in NO_DIFFERENCE)
    return {
        key: {run.name: run.recipe.get(key) for run in known}
        for key in keys
        if any(run.recipe.get(key) != known[0].recipe.get(key) for run in known)
    }


def class_differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Classes that all runs with class scores have, those that differ most first; empty for fewer than two such runs.

    Keys: name; IoU [%] by run; difference, last minus first run, None where a class has no IoU; spread, largest minus
    smallest.
    """
    known = [run for run in runs if run.ious]
    if len(known) < 2:
        return []
    rows: list[dict[str, Any]] = []
    for name in known[0].ious:
        if all(name in run.ious for run in known):
            values = {run.name: run.ious[name] for run in known}
            first, last = known[0].ious[name], known[-1].ious[name]
            gap = None if first is None or last is None else round(last - first, 4)
            numbers = [value for value in values.values() if value is not None] or [0.0]
            rows.append({"name": name, "IoU": values, "difference": gap, "spread": max(numbers) - min(numbers)})
    return sorted(rows, key=lambda row: -row["spread"])


def remarks(runs: Sequence[Run], differ: Mapping[str, Any]) -> list[str]:
    """What a reader must know to understand the table correctly; `differ`: the `recipe_differences` of the runs."""
    notes = [f"{run.name}: no evaluation yet" for run in runs if not curves.evaluated(run.records)]
    notes += [f"{run.name}: no step of training is logged" for run in runs if not curves.trained(run.records)]
    notes += [f"{run.name}: its log is damaged, lines left out: {run.damaged}" for run in runs if run.damaged]
    if len(runs) == 1:
        return [*notes, "one run only: nothing to compare it with"]
    without = [run.name for run in runs if curves.evaluated(run.records) and not run.ious]
    if without:
        notes.append(f"no IoU per class is known for {', '.join(without)}: started by an earlier version?")
    if all(run.recipe for run in runs) and not differ:
        notes.append("the recipes are the same, except for name, paths, logging and speed")
    classes = [run.ious.keys() for run in runs if run.ious]
    if any(each != classes[0] for each in classes) or any(key == "data.classes" for key in differ):
        common = set.intersection(*map(set, classes)) if classes else set()
        also = f"; {len(common)} classes have the same name in all" if classes else ""
        notes.append(f"the runs have different classes, so their mIoUs cannot be compared{also}")
    elif any(key.startswith("test.") for key in differ):
        notes.append("the runs were evaluated with different protocols (test.*), so their mIoUs cannot be compared")
    validation = [run.data.get("val") for run in runs if isinstance(run.data, dict)]
    others = any(each != validation[0] for each in validation)
    if others or any(key.startswith(("data.val", "data.dataset", "data.synthetic")) for key in differ):
        notes.append("the runs have different validation images, so their mIoUs cannot be compared")
    return notes


# ---- printing ----------------------------------------------------------------------------------------------------
def print_runs(
    rows: Sequence[dict[str, Any]], differences: Mapping[str, Mapping[str, Any]], classes: Sequence[dict[str, Any]]
) -> None:
    """Prints the tables on stdout."""

    def cell(value: Any, form: str = "") -> str:
        return "–" if value is None else f"{value:{form}}"

    # If the names do not fit as headers side by side, the runs are numbered.
    wide = sum(len(row["run"]) for row in rows) > WIDEST
    heads = {row["run"]: f"#{index}" if wide else row["run"] for index, row in enumerate(rows, 1)}
    print_table(
        ("run", "model", "classifier", "step", "best mIoU [%]", "at step", "last mIoU [%]", "images/s", "hours"),
        [
            (
                f"{heads[row['run']]} {row['run']}" if wide else row["run"],
                cell(row["model"]),
                cell(row["classifier"]),
                f"{row['step']}/{cell(row['steps'])}",
                cell(row["best_mIoU"], ".2f"),
                cell(row["best_step"]),
                cell(row["last_mIoU"], ".2f"),
                cell(row["images_per_s"], ".1f"),
                cell(row["hours"], ".2f"),
            )
            for row in rows
        ],
    )
    if differences:
        names = list(next(iter(differences.values())))
        cells = [(key, *(brief(values[name]) for name in names)) for key, values in differences.items()]
        print_table(("key", *(heads[name] for name in names)), cells, "differences between the recipes")
    if classes:
        names = list(classes[0]["IoU"])
        cells = [
            (row["name"], *(cell(row["IoU"][name], ".2f") for name in names), cell(row["difference"], "+.2f"))
            for row in classes[:MOST_CLASSES]
        ]
        most = f", the {MOST_CLASSES} of {len(classes)} that differ most" if len(classes) > MOST_CLASSES else ""
        columns = ("class", *(heads[name] for name in names), "last − first")
        print_table(columns, cells, f"IoU [%] at each run's best evaluation{most}")


def brief(value: Any, most: int = 40) -> str:
    """A value of a recipe as the text of a cell, cut after `most` letters."""
    text = "–" if value is None else str(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


# ---- drawing -----------------------------------------------------------------------------------------------------
def draw(runs: Sequence[Run], classes: Sequence[Mapping[str, Any]], destination: Path) -> None:
    """Draws mIoU, the sum of the losses, each term that several runs have, learning rate, gradient norm and speed; on
    the right the classes that differ most.
    """
    from matplotlib.figure import Figure

    logs = {run.name: curves.trained(run.records) for run in runs}
    terms = [term for run in runs for term in curves.loss_terms(logs[run.name])]
    common = [term for term in dict.fromkeys(terms) if len(runs) == 1 or terms.count(term) > 1]
    keys = ["mIoU", "loss", *common, "lr", "grad_norm", "images_per_s"]
    keys = [key for key in keys if key == "mIoU" or any(key in record for log in logs.values() for record in log)]
    tall = -(-len(keys) // 3)
    figure = Figure(figsize=(15 + 5 * bool(classes), 1 + 3.2 * tall), layout="constrained")
    sides: Any = figure.subfigures(1, 2, width_ratios=[3, 1]) if classes else [figure]
    places = np.ravel(sides[0].subplots(tall, 3))
    for axes, key in zip(places, keys, strict=False):
        draw_key(axes, runs, key)
    for axes in places[len(keys) :]:
        axes.set_visible(False)
    if classes:
        draw_classes(sides[1].subplots(), runs, classes[:MOST_CLASSES])
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), fontsize=9)
    save_figure(figure, destination, MARK)


TITLES = {
    "mIoU": "validation mIoU [%]",
    "loss": "sum of the weighted losses",
    "lr": "learning rate of the backbone",
    "grad_norm": "norm of the gradient",
    "images_per_s": "images/s",
}


def draw_key(axes: Any, runs: Sequence[Run], key: str) -> None:
    """One quantity of all runs; a star marks the best mIoU of each run."""
    drawn = []
    for index, run in enumerate(runs):
        records = curves.evaluated(run.records) if key == "mIoU" else curves.trained(run.records)
        values = line(records, key)
        drawn.append(values.values)
        dashes = ("-", "--", ":")[index // 10 % 3]  # there are ten colours
        curves.draw_line(axes, values, color=f"C{index}", linestyle=dashes, label=shorten(run.name, 60))
        best = curves.best_of(records) if key == "mIoU" else None
        if best is not None:
            axes.plot(*best, marker="*", markersize=10, color=f"C{index}")
    if key == "lr":
        axes.yaxis.set_major_formatter("{x:g}")
    elif key not in ("mIoU", "images_per_s"):
        curves.scale(axes, drawn)
    axes.set_title(TITLES.get(key, key), fontsize=10)
    curves.label_steps(axes)
    axes.set_xlim(left=0)


def draw_classes(axes: Any, runs: Sequence[Run], rows: Sequence[Mapping[str, Any]]) -> None:
    """One line for each class with a dot for the IoU of each run, and the difference of the last and the first run."""
    for row, entry in enumerate(rows):
        known = [value for value in entry["IoU"].values() if value is not None]
        axes.plot([min(known, default=0), max(known, default=0)], [row, row], color="0.7", linewidth=3, zorder=1)
        for index, run in enumerate(runs):
            if entry["IoU"].get(run.name) is not None:
                axes.plot(entry["IoU"][run.name], row, "o", color=f"C{index}", markersize=6)
        if entry["difference"] is not None:
            axes.text(max(known) + 2, row, f"{entry['difference']:+.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [shorten(row["name"]) for row in rows])
    axes.set_xlim(-2, 112)
    finish_bars(axes, len(rows))
    axes.set_title("IoU [%] at the best evaluation\n(+: last run better than first)", fontsize=10)
