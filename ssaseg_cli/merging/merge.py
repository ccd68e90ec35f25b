"""Joins what shards have written below one folder: results of `predict`, counts of `eval`, or both."""

from pathlib import Path

from ssaseg.cli.console import json_target
from ssaseg.cli.errors import CommandError
from ssaseg.cli.merging.results import has_results, merge_results
from ssaseg.cli.sharding import COUNTS
from ssaseg.files.text import printable


def run_merge(folder: Path, json_out: str | None) -> int:
    """Merges what is there. Returns 0, or 1 if images are missing or failed; then no scores are printed.

    Raises CommandError for a folder without results of shards, for shards of several runs, and for damaged files;
    OSError if files cannot be read or written.
    """
    json_out = json_target(json_out)
    results, scores = has_results(folder), (folder / COUNTS).is_dir()
    if not results and not scores:
        fix = "give the folder that was the --out of `ssaseg predict` or of `ssaseg eval --shard`"
        raise CommandError(f"{printable(str(folder))}: no results of shards in this folder\n{fix}")
    if json_out is not None and not scores:
        why = "there are no scores here, only results of `ssaseg predict`"
        raise CommandError(f"--json: {why}\nleave it out; each image is a line of {folder}/manifest.jsonl")
    code = merge_results(folder) if results else 0
    if scores:
        from ssaseg.cli.merging.scores import merge_scores  # which imports PyTorch

        code = max(code, merge_scores(folder, json_out))
    return code
