"""The device and the processor cores that a command computes with."""

import os
from typing import TYPE_CHECKING

from ssaseg.cli.errors import CommandError

if TYPE_CHECKING:
    import torch

LAUNCHED = "SSASEG_LAUNCHED"  # set for the ranks: this launcher tells itself how a process of its own ended


def select_device(name: str) -> "torch.device":
    """The device for "auto" (CUDA where there is one), "cpu" or "cuda".

    Raises:
        CommandError: "cuda" was asked for and PyTorch finds none; "auto" with `--gpus` where there is none.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and LAUNCHED in os.environ:
            raise CommandError("--gpus: PyTorch finds no GPU\nuse --device cpu for that many processes on the CPU")
    if name == "cuda" and not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no GPU"
        raise CommandError(f"--device cuda: {why}\nuse --device cpu, or --device auto to take what there is")
    # TF32, cuDNN's default, has ten bits of mantissa: scores would depend on the GPU, and float32 would not be float32.
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


def count_cores() -> int:
    """Cores that this process may use, of those that the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
