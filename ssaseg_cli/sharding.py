"""Which of several commands does which image: shard i of n, by a hash of the image's path."""

import os
import re
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import click

from ssaseg.cli.errors import CommandError, report_own_errors
from ssaseg.cli.printing import echo
from ssaseg.files.text import printable

COUNTS = "counts"  # folder below the --out of `eval --shard`
MOST = 100_000  # shards
NONE = "none"  # of `--shard`: all images, whatever the environment says
ARRAY, TASKS = "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"
FIX = f"give --shard i/n, or --shard {NONE} for all images"


class Shard(NamedTuple):
    """Shard `number` of `total`; the numbers start at 0."""

    number: int = 0
    total: int = 1

    def has(self, path: str) -> bool:
        """Whether the image with this path, written with /, below its INPUT or its data set belongs to this shard."""
        return self.total == 1 or shard_of(path, self.total) == self.number

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


WHOLE = Shard()


def shard_of(path: str, count: int) -> int:
    """The shard of an image among `count`: the first 8 bytes of BLAKE2b of its path. Other images do not change it."""
    digest = blake2b(path.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % count


def parse_shard(text: str) -> Shard:
    """The shard of `i/n`; of `none` the only one. Raises ValueError that says what is wrong."""
    if text.strip().lower() == NONE:
        return WHOLE
    index, slash, count = text.partition("/")
    if not slash or not (_is_number(index) and _is_number(count)):
        raise ValueError(f"{text!r} is not i/n, such as 0/4 for the first of four shards")
    shard = Shard(int(index), int(count))
    if not 1 <= shard.total <= MOST:
        raise ValueError(f"{text!r}: {count} shards, expected 1 to {MOST}")
    if shard.number >= shard.total:
        last = f"0/{shard.total} to {shard.total - 1}/{shard.total}"
        raise ValueError(f"{text!r}: the numbers of shards start at 0: {last}")
    return shard


def shard_name(shard: Shard, suffix: str) -> str:
    """The name of a shard's file."""
    return f"shard-{shard.number}-of-{shard.total}{suffix}"


def shards_in(folder: Path, suffix: str) -> list[tuple[Shard, Path]]:
    """The files of shards in a folder, in the order of shards; none without such a folder. Raises OSError."""
    found = []
    for name in os.listdir(folder) if folder.is_dir() else ():
        match = re.fullmatch(r"shard-(\d{1,6})-of-(\d{1,6})" + re.escape(suffix), name)
        if match and int(match[1]) < int(match[2]) <= MOST:
            found.append((Shard(int(match[1]), int(match[2])), folder / name))
    return sorted(found)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _from_text(context: click.Context, parameter: click.Parameter, value: str | None) -> Shard | None:
    try:
        return None if value is None else parse_shard(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}.", context, parameter) from None


def shard_option(command: Any) -> Any:
    """Adds `--shard`; `chosen_shard` takes its value."""
    return click.option(
        "--shard",
        metavar="I/N",
        callback=_from_text,
        help=f"Only shard I of N, from 0/N to (N-1)/N; {NONE}: all images.  "
        "[default: by a SLURM array or torchrun, else all]",
    )(command)


def chosen_shard(given: Shard | None, alone: bool = True) -> Shard:
    """The shard of `--shard`, or that of the environment, which is then reported on stderr; `WHOLE` without any.

    alone: whether the processes that torchrun starts work alone, as shards, and not together as ranks. Raises
    CommandError for an environment that does not say which shard this is.
    """
    if given is not None:
        return given
    of_array, of_ranks = _of_array(os.environ), _of_ranks(os.environ) if alone else WHOLE
    if of_array.total > 1 and of_ranks.total > 1:
        both = f"{ARRAY} says shard {of_array}, RANK and WORLD_SIZE say shard {of_ranks}"
        raise CommandError(f"{both}\nexpected a SLURM array or torchrun, not both\n{FIX}")
    shard, source = (of_array, ARRAY) if of_array.total > 1 else (of_ranks, "RANK")
    if shard.total > 1 and (alone or os.environ.get("RANK", "0") == "0"):
        echo(f"shard {shard}, by {source}={os.environ[source]}; --shard {NONE}: all images", err=True)
    if shard is of_ranks and shard.total > 1:
        report_own_errors()
    return shard


def _of_array(environment: Mapping[str, str]) -> Shard:
    """The shard of a task of a SLURM array. Arrays may start at any number and have steps: 1-7:2 is 0/4 to 3/4."""
    if ARRAY not in environment or TASKS not in environment:
        return WHOLE
    number, count = _number(environment, ARRAY), _number(environment, TASKS)
    low = _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
    high = _number(environment, "SLURM_ARRAY_TASK_MAX", low + count - 1)
    step, rest = divmod(high - low, max(count - 1, 1))
    index, odd = divmod(number - low, max(step, 1))
    if count < 1 or rest or odd or not 0 <= index < count:
        got = f"{ARRAY}={number} of {count} tasks from {low} to {high}"
        raise CommandError(f"{got}\nexpected numbers with one step, such as --array=0-15\n{FIX}")
    return Shard(index, count)


def _of_ranks(environment: Mapping[str, str]) -> Shard:
    """The shard of a process that torchrun has started."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return WHOLE
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if rank >= size:
        raise CommandError(f"RANK={rank}, WORLD_SIZE={size} in the environment\nexpected a smaller rank\n{FIX}")
    return Shard(rank, size)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not _is_number(text):
        raise CommandError(f"{name}={printable(str(text))[:100]} in the environment\nexpected a number\n{FIX}")
    return int(text)
