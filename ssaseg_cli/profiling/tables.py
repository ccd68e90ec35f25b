"""The tables of `ssaseg profile` on stdout."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ssaseg.cli.console import print_table
from ssaseg.cli.printing import echo
from ssaseg.cli.profiling.counting import COUNTINGS, EVERY_OPERATION, MODULES_ONLY
from ssaseg.files.text import printable
from ssaseg.models import CLASSIFIERS

Column = Mapping[str, Any]


def print_profile(report: Mapping[str, Any]) -> None:
    """Prints the columns side by side, then stages, roofline, back ends, batch sizes and threads of each."""
    columns = report["columns"]
    height, width = report["size"]
    network = report["target"] if report["model"] in (None, "unknown") else report["model"]
    title = f"{network}, {report['classes']} classes, {height}x{width} (height x width), {report['device']}"
    print_table(("", *(heading(column) for column in columns)), summary_rows(columns), title)
    if any("gmacs" in column for column in columns):
        for name, meaning in COUNTINGS.items():
            echo(f"{name}: {meaning}")
    echo(f"engine: {', '.join(dict.fromkeys(column['engine'] for column in columns))}")
    echo(f"{report['runs']} timed passes each, in turn; {report['threads']} CPU threads; torch {report['torch']}")
    if report["weights"] == "random":
        echo("weights are random: a trained network may need less time for labels, and back ends agree on more of them")
    print_stages(report)
    for column in columns:
        of = heading(column)
        if column.get("roofline"):
            print_roofline(of, column["roofline"], report["speed"])
        if "sweep" in column:
            print_sweep(of, column["sweep"])
        if "backends" in column:
            print_backends(of, column["backends"])


def heading(column: Column) -> str:
    """The classifier's name, with what must be known of it."""
    name = "network" if column["classifier"] in (None, "unknown") else column["classifier"]
    kind = CLASSIFIERS.get(name)
    return name + (f" ({kind.NOTE})" if kind and kind.NOTE else "")


def summary_rows(columns: Sequence[Column]) -> list[tuple[str, ...]]:
    """The rows of the first table; what is not known of any column has no row."""
    rows: list[tuple[str, ...]] = []

    def row(label: str, value: Callable[[Column], str | None]) -> None:
        cells = [value(column) for column in columns]
        if any(cells):
            rows.append((label, *(cell or "-" for cell in cells)))

    def counted(key: str) -> Callable[[Column], str | None]:
        return lambda column: f"{column[key] / 1e6:.4f}" if key in column else None

    def products(counting: str) -> Callable[[Column], str | None]:
        return lambda column: f"{column['gmacs'][counting]:.3f}" if "gmacs" in column else None

    row("parameters [M]", counted("parameters"))
    row("  without training-only ones [M]", counted("parameters_deployed"))
    row(f"GMACs, {EVERY_OPERATION}", products(EVERY_OPERATION))
    row(f"GMACs, {MODULES_ONLY}", products(MODULES_ONLY))
    row("network, p50 / p90 [ms]", lambda column: _both(column["network_ms"]))
    row("  exact (--exact of predict)", lambda column: column["exact"] and _both(column["exact"]["network_ms"]))
    row("upsampling and arg-max, p50 / p90 [ms]", lambda column: _both(column["post_ms"]))
    row("peak memory, with weights [MiB]", lambda column: _figure(column["peak_mib"]))
    row("  exact", lambda column: column["exact"] and _figure(column["exact"]["peak_mib"]))
    row("memory of pixels, in training only [MiB]", lambda column: _figure(column.get("memory_mib") or None))
    return rows


def print_stages(report: Mapping[str, Any]) -> None:
    """Time, share and memory of each stage, all columns side by side."""
    columns = report["columns"]
    heads = [f"{heading(column)} {unit}" for column in columns for unit in ("[ms]", "share", "[MiB]")]
    found = [{row["stage"]: row for row in column["stages"]["rows"]} for column in columns]
    rows = []
    for stage in dict.fromkeys(name for each in found for name in each):
        cells = [
            (f"{r['ms']:.2f}", f"{100 * r['share']:.1f} %", f"{r['mib']:.1f}") for r in (each[stage] for each in found)
        ]
        rows.append((stage, *(text for three in cells for text in three)))
    for label, key in (("sum of the stages", "sum_ms"), ("the whole, by the code of predict", "whole_ms")):
        rows.append((label, *(text for column in columns for text in (f"{column['stages'][key]:.2f}", "", ""))))
    print_table(("one image, one stage after the other", *heads), rows, f"image: {report['image']}")
    echo(
        f"medians of {report['stage_runs']} passes; memory: tensors and arrays, no weights. Upsampling and arg-max "
        "are one step, without full-size logits. `predict` reads, labels and writes several images at a time"
    )


def print_roofline(of: str, rows: Sequence[Mapping[str, Any]], speed: Mapping[str, float]) -> None:
    """Work and least time of each stage of the network, beside the measured time."""
    heads = ("stage", "GMACs", "operations", "moved [MB]", "at least [ms]", "products only", "measured [ms]", "ratio")
    cells = [
        (
            row["stage"],
            f"{row['gmacs']:.3f}",
            str(row["operations"]),
            f"{row['mb']:.1f}",
            f"{row['least_ms']:.2f}",
            f"{row['products_ms']:.2f}",
            f"{row['ms']:.2f}",
            "-" if row["ratio"] is None else f"{row['ratio']:.1f}",
        )
        for row in rows
    ]
    print_table(heads, cells, f"{of}: roofline")
    reached = ", ".join(f"{name} {value / 1e9:.1f} G" for name, value in speed.items())
    echo(f"at least: by the speeds that this process reached ({reached}); every operation reads and writes its tensors")
    echo("products only: convolutions and matrix products, as if all else were fused into them")


def print_sweep(of: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Images per second for each number of threads and batch size."""
    cells = [
        (str(row["threads"]), str(row["batch"]), row["failed"], "-", "-", "-")
        if "failed" in row
        else (
            str(row["threads"]),
            str(row["batch"]),
            _both(row["batch_ms"]),
            f"{row['batch_ms']['p50'] / row['batch']:.2f}",
            f"{row['images_per_s']:.1f}",
            _figure(row["peak_mib"]) or "-",
        )
        for row in rows
    ]
    heads = ("threads", "batch", "p50 / p90 [ms]", "an image [ms]", "images/s", "peak memory [MiB]")
    print_table(heads, cells, f"{of}: network and labels, by threads and batch size")


def print_backends(of: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One row for each way to run the network; below the table, why some could not be measured."""
    heads = ("engine", "p50 / p90 [ms]", "faster than exact", "equal labels", "built in [s]", "peak memory [MiB]")
    measured = [row for row in rows if "failed" not in row]
    cells = [
        (
            row["name"],
            _both(row["network_ms"]),
            f"{row['ratio']:.2f}x",
            f"{100 * row['same_labels']:.3f} %",
            f"{row['build_s']:.1f}" + " (export kept)" * row["cached"],
            _figure(row["peak_mib"]) or "-",
        )
        for row in measured
    ]
    print_table(heads, cells, f"{of}: back ends, each in its own process, in turn with the exact network")
    for row in rows:
        if "failed" in row:
            echo(f"not measured: {row['name']}: {printable(row['failed'])}")
    libraries = [row["before_mib"] for row in measured if row["before_mib"] is not None]
    if libraries:
        echo(f"peak memory: of the process while it builds and runs; before that: {min(libraries):.0f} MiB")


def _both(times: Mapping[str, float]) -> str:
    return f"{times['p50']:.2f} / {times['p90']:.2f}"


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"
