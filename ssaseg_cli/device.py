"""The device that a command computes on, and the number of processor cores that it may use."""

import os
from typing import TYPE_CHECKING

from ssaseg.cli.errors import CommandError
from ssaseg.files.machine import count_cores

if TYPE_CHECKING:
    import torch

__all__ = ["LAUNCHED", "count_cores", "select_device"]

# Set for the ranks that `--gpus` starts: the folder where they meet. `--gpus` prints itself how one of them ended.
LAUNCHED = "SSASEG_LAUNCHED"


def select_device(name: str) -> "torch.device":
    """The device for "auto" (CUDA if there is a GPU, else the CPU), "cpu" or "cuda".

    Raises:
        CommandError: PyTorch finds no GPU, and "cuda" was requested, or "auto" together with `--gpus`.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and LAUNCHED in os.environ and "RANK" in os.environ:
            raise CommandError("--gpus: PyTorch finds no GPU\nuse --device cpu to run the processes on the CPU")
    if name == "cuda" and not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no GPU"
        raise CommandError(
            f"--device cuda: {why}\nuse --device cpu, or --device auto, which uses a GPU only if there is one"
        )
    # TF32, cuDNN's default, has a mantissa of only ten bits: results would differ from float32, and between GPUs.
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)
