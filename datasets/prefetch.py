"""Batches on their way to the device: on a GPU copied and prepared beside the step that it still computes."""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from ssaseg.datasets.colour import prepare_batch
from ssaseg.datasets.loader import Batch

# Batches that may wait on the device for those before them.
AHEAD = 2


class Preparer:
    """`prepare_batch`, on a CUDA stream of its own where `beside` is true and there is one.

    The program runs ahead of a GPU: when it asks for a batch, the step before is queued but not yet computed. On the
    main stream the batch would queue behind it; on its own it is copied, distorted and normalised meanwhile. With more
    than `AHEAD` batches waiting the program waits, too: each of them takes memory. So much for one GPU: with several
    the program waits at each SyncBatchNorm (`Ranks.wrap`) and is ahead by no more than a backward pass.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device, beside: bool) -> None:
        self.mean, self.std, self.device = mean, std, device
        self.stream = torch.cuda.Stream(device) if beside and device.type == "cuda" else None
        self.done: deque[torch.cuda.Event] = deque()  # after each of the last batches' predecessors

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images float32 (N,3,H,W) normalised RGB and labels int64 (N,H,W), to be used on the current stream."""
        if self.stream is None:
            return prepare_batch(batch, self.mean, self.std, self.device)
        main = torch.cuda.current_stream(self.device)
        self.done.append(main.record_event(torch.cuda.Event(blocking=True)))  # blocking: leaves the core to the loader
        if len(self.done) > AHEAD:
            self.done.popleft().synchronize()
        with torch.cuda.stream(self.stream):
            prepared = prepare_batch(batch, self.mean, self.std, self.device)
        main.wait_stream(self.stream)  # the GPU waits, not the program
        for tensor in prepared:
            # Otherwise the allocator would hand its memory to the next batch while the network still reads it.
            tensor.record_stream(main)
        return prepared
