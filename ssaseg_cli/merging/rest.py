"""What shards have left, in words: which of them, how many images, and the commands that do it."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssaseg.cli.printing import echo
from ssaseg.cli.sharding import Shard
from ssaseg.files.text import printable

EXAMPLES = 3  # images or shards that are named

SHARD = "--shard"
AGAIN = ("--resume", "--skip-existing")  # two names of one option


def report_rest(folder: Path, left: Mapping[Shard, str], command: Sequence[Any]) -> None:
    """Prints on stderr what each shard has left, and the command line for the first of them.

    left: in words, by shard. command: the command line of any shard, as it was typed.
    """
    echo(f"{printable(str(folder))}: not complete, so nothing was merged", err=True)
    for shard, what in [*left.items()][: 10 * EXAMPLES]:
        echo(f"shard {shard}: {what}", err=True)
    if len(left) > 10 * EXAMPLES:
        echo(f"and {len(left) - 10 * EXAMPLES} more shards", err=True)
    others = "; the others likewise" if len(left) > 1 else ""
    echo(f"to do the rest: {command_for(command, next(iter(left)))}{others}", err=True)


def command_for(command: Sequence[Any], shard: Shard) -> str:
    """The command line of a shard, made from that of another one."""
    words = [str(word) for word in command]
    kept = [
        word
        for before, word in zip(["", *words], words, strict=False)
        if before != SHARD and word != SHARD and not word.startswith(f"{SHARD}=") and word not in AGAIN
    ]
    return printable(shlex.join([*kept, SHARD, str(shard), *AGAIN[: "predict" in kept[1:2]]]))


def some(names: Sequence[str]) -> str:
    """The first names of several, safe to print."""
    return ", ".join(map(printable, names[:EXAMPLES])) + ", …" * (len(names) > EXAMPLES)
