"""The memory of a pass: the tensors and arrays that are held at the same time."""

import tracemalloc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssaseg.cli.scoring.engines import Engine, TorchEngine
from ssaseg.cli.scoring.limit import kilobytes
from ssaseg.models.labelling import label_map


def peak_memory(engine: Engine, pixels: Tensor) -> int | None:
    """Largest number of bytes held during one pass, with post-processing: the model's tensors, the pixels (N,C,H,W),
    all results. None if another runtime than PyTorch computes.

    Measured by `max_memory_allocated` on CUDA, and on the CPU by `LiveTensors`, which misses the memory that operations
    use internally.
    """
    if not isinstance(engine, TorchEngine):
        return None
    size = tuple(pixels.shape[-2:])
    held = [*engine.model.state_dict().values(), pixels]
    own = sum(tensor.numel() * tensor.element_size() for tensor in held)
    live = LiveTensors(held)
    on_cuda = pixels.device.type == "cuda"
    before = torch.cuda.memory_allocated(pixels.device) if on_cuda else 0
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(pixels.device)
    with torch.inference_mode(), nullcontext() if on_cuda else live:
        logits = engine.logits(pixels).final
        for image in range(len(logits)):
            label_map(logits[image : image + 1], size, size)
    return own + (torch.cuda.max_memory_allocated(pixels.device) - before if on_cuda else live.peak)


class Peaks:
    """The most bytes of tensors and NumPy arrays that are held at the same time, from one `take` to the next.

    What was held before is not counted.
    """

    def __init__(self, device: torch.device, held: Sequence[Tensor]) -> None:
        self.device, self.live = device, LiveTensors(held)
        self.before = 0  # on a GPU

    @contextmanager
    def running(self) -> Iterator["Peaks"]:
        """Counts inside this context; everything in it is slower."""
        with LiveTensors([]):
            torch.zeros(1)  # imports of PyTorch that the first operation in such a mode needs
        tracemalloc.start()
        try:
            with self.live:
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                    self.before = torch.cuda.memory_allocated(self.device)
                    torch.cuda.reset_peak_memory_stats(self.device)
                yield self
        finally:
            tracemalloc.stop()

    def take(self) -> int:
        """The peak since the last call, or since the start."""
        arrays, tensors = tracemalloc.get_traced_memory()[1], self.live.peak
        tracemalloc.reset_peak()
        self.live.peak = self.live.now
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            tensors = torch.cuda.max_memory_allocated(self.device) - self.before
            torch.cuda.reset_peak_memory_stats(self.device)
        return arrays + tensors


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all live storages that operations returned; `peak`: their maximum. `held` is not counted."""

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, list | tuple) else [output]:
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata  # a view or an in-place operation returns a known storage
        if address in self.known:
            return
        self.known.add(address)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, address, storage.nbytes())

    def _free(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


def process_peak() -> int | None:
    """The most bytes of memory that this process has had so far; None where the system does not say it."""
    return kilobytes(
        "/proc/self/status", "VmHWM"
    )  # not ru_maxrss, which counts the parent's memory before it starts us
