"""Adds what the shards of `ssaseg eval` have counted, and prints the scores of all images."""

from collections.abc import Sequence
from pathlib import Path

from ssaseg.cli.console import write_json
from ssaseg.cli.errors import CommandError
from ssaseg.cli.evaluation.counts import (
    Counts,
    counts_file,
    counts_files,
    read_counts,
    require_one_run,
    require_same,
    together,
)
from ssaseg.cli.evaluation.report import report_of, require_labels
from ssaseg.cli.evaluation.tables import print_any
from ssaseg.cli.merging.rest import report_rest
from ssaseg.cli.sharding import COUNTS, Shard
from ssaseg.files.text import printable


def merge_scores(out: Path, json_out: str | None) -> int:
    """Prints the scores of all shards below `out`, and writes the report of `--json`; 1 if a shard is missing.

    The speed is that of one shard: all images by the seconds of all shards. Raises as `run_merge`, and CommandError if
    no pixel is labelled.
    """
    files = counts_files(out)
    if not files:
        raise CommandError(
            f"{printable(str(out / COUNTS))}: no counts of shards\nrun `ssaseg eval` with --shard and --out"
        )
    every = [read_counts(path) for _, path in files]
    first = every[0]
    require_one_run(out, first.shard, first.run)
    for (_, path), counts in zip(files, every, strict=True):
        require_same(path, counts.run, first.run)
    there, total = {each.shard for each in every}, first.shard.total
    missing = [shard for shard in (Shard(number, total) for number in range(total)) if shard not in there]
    if missing:
        what = {shard: f"missing: no {COUNTS}/{counts_file(out, shard).name}" for shard in missing}
        report_rest(out, what, first.command)
        return 1
    require_each_once(out, every)
    sums = together(every)
    require_labels(sums[0].confusion.matrix, f"{first.images} images of all shards")
    speed = first.images / max(sum(each.seconds for each in every), 1e-9)
    report = report_of([{**head, "images_per_s": speed} for head in first.heads], sums, first.classes)
    write_json(json_out, report)
    if json_out != "-":
        print_any(report)
    return 0


def require_each_once(out: Path, every: Sequence[Counts]) -> None:
    """Raises CommandError if the shards together do not have each image once, or an image of another shard."""
    numbers = sorted(number for each in every for number in each.numbers)
    if numbers != list(range(every[0].images)):
        twice = len(numbers) - len(set(numbers))
        what = f"{len(set(numbers))} of {every[0].images} images, {twice} of them twice"
        raise CommandError(f"{printable(str(out / COUNTS))}: {what}\ndelete this folder, and run the shards again")
    for each in every:
        for name in each.names:
            if not each.shard.has(name):
                path = printable(str(counts_file(out, each.shard)))
                what = f"{printable(name)} is not an image of shard {each.shard}"
                raise CommandError(f"{path}: {what}\ndelete it, and run that shard again")
