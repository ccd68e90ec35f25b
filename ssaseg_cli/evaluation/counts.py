"""`eval --shard`: what a shard has counted, in one file, `OUT/counts/shard-I-of-N.counts`, for `ssaseg merge`.

The file has the counts of the shard's images, each image's intersections and unions with its name and its number in
the data, and all that a report says besides: the scores of all shards together are those of one command, to the bit.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ssaseg.cli.engine.opening import checkpoint_sum
from ssaseg.cli.errors import CommandError
from ssaseg.cli.ranks.messages import pack, unpack
from ssaseg.cli.scoring.evaluate import Sums
from ssaseg.cli.sharding import COUNTS, Shard, shard_name, shards_in
from ssaseg.datasets import Dataset
from ssaseg.files.reading import read_file
from ssaseg.files.text import printable
from ssaseg.files.writing import write_atomic

SUFFIX = ".counts"
DIGEST = 32  # bytes at the end of a file
LARGEST = 2**34  # bytes of a file: 14 million images of 150 classes


class Counts(NamedTuple):
    """What a shard has counted."""

    shard: Shard
    run: dict[str, Any]  # what all shards have in common, see `run_of`
    heads: list[dict[str, Any]]  # of each file: what its report says besides its scores
    classes: list[str]
    numbers: list[int]  # of the shard's images, among the images that all shards count
    names: list[str]  # of the same
    seconds: float
    command: list[str]  # as it was typed
    sums: list[dict[str, Any]]  # of each file: see `Sums.snapshot`

    @property
    def images(self) -> int:
        """How many images all shards have together."""
        return int(self.run["images"])


def run_of(files: Sequence[Path], dataset: Dataset, images: int, data: object, how: Sequence[str]) -> dict[str, Any]:
    """What all shards of a run have in common: sums of the checkpoints and of the data, the number of images, and how
    they are scored. data: what else decides the labels. Raises OSError for a missing file of the data.
    """
    facts = [repr(data), *(dataset.name(number) for number in range(len(dataset))), *dataset.identity()]
    digest = hashlib.sha256("\n".join(facts).encode("utf-8", "surrogateescape")).hexdigest()
    sums = [checkpoint_sum(file) for file in files]
    return {"files": sums, "data": digest, "images": images, "protocol": list(how)}


# What differs between two runs, in words.
PARTS = {"files": "other FILEs", "data": "other data", "images": "--limit", "protocol": "another protocol or engine"}


def counts_file(out: Path, shard: Shard) -> Path:
    """The file of a shard's counts."""
    return out / COUNTS / shard_name(shard, SUFFIX)


def counts_files(out: Path) -> list[tuple[Shard, Path]]:
    """The files of shards that are there, in the order of shards. Raises OSError."""
    return shards_in(out / COUNTS, SUFFIX)


def write_counts(out: Path, counts: Counts) -> None:
    """Writes the file of a shard, whole or not at all, with the SHA-256 of its content at its end. Raises OSError."""
    values = {**counts._asdict(), "shard": [counts.shard.number, counts.shard.total]}
    folder = counts_file(out, counts.shard).parent
    folder.mkdir(parents=True, exist_ok=True)
    content = pack(values).numpy().tobytes()
    write_atomic(counts_file(out, counts.shard), content + hashlib.sha256(content).digest(), root=folder)


def read_counts(path: Path) -> Counts:
    """The counts of a shard. Raises CommandError for another file or the file of another shard, OSError."""
    whole = read_file(path, LARGEST)
    content, digest = whole[:-DIGEST], whole[-DIGEST:]
    fix = "delete it, and run that shard again"
    if hashlib.sha256(content).digest() != digest:
        raise CommandError(f"{printable(str(path))}: not the counts of a shard, or damaged\n{fix}")
    try:
        values = unpack(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        counts = Counts(**{**values, "shard": Shard(*values["shard"])})
    except (CommandError, TypeError, KeyError):
        raise CommandError(f"{printable(str(path))}: counts of another version of ssaseg\n{fix}") from None
    if path.name != counts_file(path, counts.shard).name:
        wrong = f"holds shard {counts.shard}: two shards with the same number"
        fix = f"delete it, and run the shard of its name again: each has its own --shard i/{counts.shard.total}"
        raise CommandError(f"{printable(str(path))}: {wrong}\n{fix}")
    return counts


def require_one_run(out: Path, shard: Shard, run: Mapping[str, Any]) -> None:
    """Raises CommandError if there are counts of another number of shards, or if the first are of another run."""
    fix = f"choose another --out, or delete {printable(str(out / COUNTS))} to begin anew"
    files = counts_files(out)
    for other, path in files:
        if other.total != shard.total:
            got = f"{printable(str(path))}: a shard of {other.total}, but shard {shard} is of {shard.total}"
            raise CommandError(f"{got}\nexpected one number of shards in one --out\n{fix}")
    for _, path in files[:1]:
        require_same(path, read_counts(path).run, run)


def require_same(path: Path, theirs: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raises CommandError if `theirs`, the run of the counts in `path`, is not `run`."""
    if theirs != run:
        what = ", ".join(words for key, words in PARTS.items() if theirs[key] != run.get(key))
        where = f"{printable(str(path))}: a shard of another run: {what}"
        fix = f"choose another --out, or delete {printable(str(path.parent))} to begin anew"
        raise CommandError(f"{where}\nexpected shards of one run in one --out\n{fix}")


def together(every: Sequence[Counts]) -> list[Sums]:
    """The sums of all shards of one run, for each file. The images are in the order of one command."""
    places = [np.asarray(each.numbers, np.intp).tolist() for each in every]
    classes = len(every[0].classes)
    return [Sums.merged([each.sums[at] for each in every], places, classes) for at in range(len(every[0].heads))]
