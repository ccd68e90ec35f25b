"""`ssaseg eval --shard`: counts the images of one shard, and leaves the scores to `ssaseg merge`."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ssaseg.cli.evaluation.counts import Counts, require_one_run, run_of, write_counts
from ssaseg.cli.evaluation.report import Request, count_images, device_of, open_files, prepare
from ssaseg.cli.printing import echo
from ssaseg.cli.ranks.ranks import connect
from ssaseg.files.text import printable


def run_shard(files: Sequence[Path], request: Request, out: Path, device: str) -> int:
    """Counts the predictions of `files` on the images of a shard, and writes what was counted below `out`.

    Returns exit code 0, also of a shard without images. Raises as `run_eval`, and CommandError if `out` has the counts
    of another run or of another number of shards: before images are counted, and again before anything is written.
    """
    shard = request.shard
    with connect(device_of(files, device)) as ranks:
        counted = prepare(ranks, open_files(files, request), request)
        dataset = counted.dataset
        inputs = [(each.metadata["mean"], each.metadata["std"]) for each in counted.opened]
        how = [f"{head['statement']}; {each}" for head, each in zip(counted.heads(request), inputs, strict=True)]
        # Each machine may have the data in another place.
        data = counted.recipe.name, sorted(counted.recipe.data.model_dump(exclude={"root"}).items())
        run = run_of(files, dataset, counted.images, data, how)
        if ranks.main:
            require_one_run(out, shard, run)
        counted = count_images(ranks, counted)
        if not ranks.main:
            return 0
        numbers = list(counted.numbers)
        names = [dataset.name(number) for number in numbers]
        sums = [tally.snapshot() for tally in counted.tallies]
        require_one_run(out, shard, run)
        heads = counted.heads(request)
        command = ["ssaseg", *sys.argv[1:]]
        counts = Counts(shard, run, heads, list(dataset.classes), numbers, names, counted.seconds, command, sums)
        write_counts(out, counts)
        echo(f"counted {len(numbers)} of {counted.images} images in {counted.seconds:.1f} s: shard {shard}")
        echo(f"after all shards: ssaseg merge {shlex.quote(printable(str(out)))}")
    return 0
