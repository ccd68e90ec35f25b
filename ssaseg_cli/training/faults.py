"""What a step may die of that a recipe's key mends, told by that key."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ssaseg.cli.errors import CommandError
from ssaseg.cli.signals import Interrupted

if TYPE_CHECKING:
    from ssaseg.cli.training.job import Job


def advice(job: "Job", skippable: bool = True) -> str:
    """What to do after a number that is not finite: going on with the same recipe would end the same way.

    skippable: leaving out updates would help.
    """
    weights, limit = job.folder / "last.safetensors", job.guard.limit
    start, skip = "", ""
    if weights.exists():
        # Not these: they are finite, and may have diverged all the same. Before a first evaluation little is lost.
        best = job.folder / "best.safetensors"
        start = f"model.pretrained={best}, " if best.exists() else ""
        more = f"train.max_skipped above {limit} leaves more" if limit else "train.nonfinite=skip leaves"
        skip = f"--resume with {more} such updates out; else " if skippable else ""
    return f"{skip}start a new run with {start}a lower optim.lr, optim.grad_clip=1 or train.amp=off"


@contextlib.contextmanager
def told(job: "Job", evaluation: bool = False) -> Iterator[None]:
    """Around a step, or an evaluation: turns what PyTorch raises into a CommandError that names the key.

    Raises Interrupted where a signal to stop has ended the compiler, too: a terminal sends Ctrl-C to all its processes.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        from ssaseg.cli.training.memory import explain

        if not evaluation:
            raise explain(job, error) from None
        raise CommandError(
            f"{job.device}: its memory is used up by a validation image in the evaluation after step "
            f"{job.progress.step}, whose state is saved\nexpected room for each image at its test.scale\n"
            "start a new run with test.mode=slide, test.crop and test.stride, or a smaller test.scale"
        ) from None
    except FileNotFoundError as error:
        raise mendable(error) from None
    except RuntimeError as error:
        text = str(error)
        if job.recipe.train.compile and job.stop.requested:
            raise Interrupted from None
        if job.recipe.train.deterministic and "deterministic" in text:
            what = text.partition(" does not have")[0].partition(". ")[0].splitlines()[0][:200]
            raise CommandError(
                f"train.deterministic: on this device PyTorch has no deterministic form of {what}\n"
                "expected one for every operation of the network\n"
                "use train.deterministic=false (same seeds, equal to rounding), or a CPU"
            ) from None
        if job.recipe.train.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            what = " ".join(text.split())[:200]
            raise CommandError(
                f"train.compile: torch.compile failed ({type(error).__name__}: {what})\n"
                "expected a compiler that works here: Triton on a GPU, a C++ compiler on a CPU\n"
                "use train.compile=false"
            ) from None
        raise


def mendable(error: Exception) -> Exception:
    """For a file of the data that was there when the run began, and cannot be read now, an error that says what to do;
    any other as it is.
    """
    if not isinstance(error, OSError) or error.filename is None:
        return error
    return CommandError(
        f"{error.filename}: {error.strerror}\n"
        "expected a file that can be read as long as the run lasts: it was there at its beginning\n"
        "restore it, or the disk that it is on, then go on with --resume"
    )
