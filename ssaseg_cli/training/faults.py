"""Errors of a training step that a recipe's key fixes: the message names that key."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ssaseg.cli.errors import CommandError
from ssaseg.cli.signals import Interrupted
from ssaseg.cli.training.state import out_of_memory

if TYPE_CHECKING:
    from ssaseg.cli.training.job import Job


def advice(job: "Job", skippable: bool = True) -> str:
    """What to do after a number that is not finite. To continue with the same recipe would end the same way.

    skippable: whether it would help to skip updates.
    """
    weights, limit = job.folder / "last.safetensors", job.guard.limit
    start, skip = "", ""
    if weights.exists():
        # Not the last weights: they are finite, but may have diverged. Before a first evaluation little is lost.
        best = job.folder / "best.safetensors"
        start = f"model.pretrained={best}, " if best.exists() else ""
        option = f"train.max_skipped above {limit}" if limit else "train.nonfinite=skip"
        skip = f"--resume with {option} skips {'more ' * bool(limit)}such updates; otherwise " if skippable else ""
    return f"{skip}start a new run with {start}a lower optim.lr, optim.grad_clip=1 or train.amp=off"


@contextlib.contextmanager
def explained(job: "Job", evaluation: bool = False) -> Iterator[None]:
    """Around a step, or an evaluation: turns what PyTorch raises into a CommandError that names the recipe's key.

    Raises Interrupted if a signal to stop has also ended the compiler: a terminal sends Ctrl-C to all its processes.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        from ssaseg.cli.training.memory import explain

        if not evaluation:
            raise explain(job, error) from None
        raise CommandError(
            f"{job.device}: out of memory for a validation image, in the evaluation after step {job.progress.step}; "
            "the state is saved\nexpected memory for each image at test.scale\n"
            "start a new run with test.mode=slide, test.crop and test.stride, or a smaller test.scale"
        ) from None
    except FileNotFoundError as error:
        raise explain_file_error(error) from None
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if job.recipe.train.compile and job.stop.requested:
            raise Interrupted from None
        if out_of_memory(error):
            raise CommandError(
                f"{job.device}: not enough memory for {'a validation image' if evaluation else 'a step'}\n"
                "expected memory for all images of a pass\nuse a smaller train.micro_batch or augment.crop"
            ) from None
        if job.recipe.train.deterministic and "deterministic" in text:
            what = text.partition(" does not have")[0].partition(". ")[0].splitlines()[0][:200]
            raise CommandError(
                f"train.deterministic: on this device PyTorch has no deterministic form of {what}\n"
                "expected one for every operation of the network\n"
                "use train.deterministic=false (same seeds, results equal except for rounding), or a CPU"
            ) from None
        if job.recipe.train.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            what = " ".join(text.split())[:200]
            raise CommandError(
                f"train.compile: torch.compile failed ({type(error).__name__}: {what})\n"
                "expected a compiler that works on this machine: Triton for a GPU, a C++ compiler for a CPU\n"
                "use train.compile=false"
            ) from None
        raise


def explain_file_error(error: Exception) -> Exception:
    """If a file of the data can no longer be read, an error that says what to do. Any other error is returned
    unchanged.
    """
    if not isinstance(error, OSError) or error.filename is None:
        return error
    return CommandError(
        f"{error.filename}: {error.strerror}\n"
        "expected a file that can be read until the run ends: it existed when the run started\n"
        "restore it, or the disk that it is on, then continue with --resume"
    )
