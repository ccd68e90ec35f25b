"""The device that a command computes on, and the number of processor cores that it may use."""

import ctypes
import os
import sys
from typing import TYPE_CHECKING

from ssaseg.cli.errors import CommandError
from ssaseg.files.machine import count_cores

if TYPE_CHECKING:
    import torch

__all__ = ["LAUNCHED", "count_cores", "select_device"]

# Set for the ranks that `--gpus` starts: the folder where they meet. `--gpus` prints itself how one of them ended.
LAUNCHED = "SSASEG_LAUNCHED"

# Any other value than "calm" leaves the memory allocator as the system has it.
ALLOCATOR = "SSASEG_ALLOCATOR"
# From glibc's malloc.h: the parameter, and its value here.
CALM = {
    -4: 0,  # M_MMAP_MAX: no large tensor gets pages of its own, which would have to be cleared and given back
    -1: -1,  # M_TRIM_THRESHOLD: freed memory is kept for the next tensor
    -2: 1 << 26,  # M_TOP_PAD: the heap grows by 64 MiB at a time
}


def calm_allocator() -> bool:
    """Tells glibc to keep freed memory instead of giving it back to the system; returns whether it does.

    Without it, the system clears new pages for every large tensor: a third of the time of a small network's pass on a
    CPU. Where there is no glibc, or SSASEG_ALLOCATOR is not "calm", nothing changes. Call it before work starts.
    """
    if sys.platform != "linux" or os.environ.get(ALLOCATOR, "calm") != "calm":
        return False
    try:
        library = ctypes.CDLL(None)
        _ = library.gnu_get_libc_version  # musl has mallopt, which does nothing
        return all(library.mallopt(parameter, value) for parameter, value in CALM.items())
    except (AttributeError, OSError):
        return False


def select_device(name: str) -> "torch.device":
    """The device for "auto" (CUDA if there is a GPU, else the CPU), "cpu" or "cuda".

    Raises:
        CommandError: PyTorch finds no GPU, and "cuda" was requested, or "auto" together with `--gpus`.
    """
    import torch

    calm_allocator()
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
