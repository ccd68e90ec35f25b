"""`ssaseg merge`: its arguments and help. PyTorch is imported only where there are scores to compute."""

from pathlib import Path

import click

from ssaseg.cli.options import json_option


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@json_option
def merge(folder: Path, json_out: str | None) -> int:
    """Join the shards of predict and eval.

    DIR is the --out of `ssaseg predict --shard` or `ssaseg eval --shard`. First it is checked that all shards are
    there, that they are of one run, and that each has all its images; otherwise nothing is written, and it is printed
    what is missing and which command does it.

    Of predict, DIR/manifest.jsonl, rle.json and shares.json are written as by one command without shards. Of eval, the
    scores are printed that one command would have printed, equal to the last digit. To merge again gives the same.

    The exit code is 1 if images are missing, and if there are images that could not be labelled.

    \b
    Example:
      ssaseg merge labels
      ssaseg merge scores --json scores.json
    """
    from ssaseg.cli.merging.merge import run_merge

    return run_merge(folder, json_out)
