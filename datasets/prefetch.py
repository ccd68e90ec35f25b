"""Preparing batches on the device: on a GPU a batch is copied and prepared while the step before is still computed."""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from ssaseg.datasets.colour import prepare_batch
from ssaseg.datasets.loader import Batch

# Batches that may be queued on the device at the same time.
AHEAD = 2


class Preparer:
    """`prepare_batch`, on a separate CUDA stream where `beside` is true and the device is a GPU.

    The program runs ahead of a GPU: when it requests a batch, the step before is queued but not yet computed. On the
    main stream the batch would have to wait for that step; on a separate stream it is copied, distorted and normalised
    in the meantime. While more than `AHEAD` batches are queued the program waits, as each of them takes memory. With
    several GPUs the program waits at each SyncBatchNorm (`Ranks.wrap`) and is ahead by at most a backward pass.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device, beside: bool) -> None:
        self.mean, self.std, self.device = mean, std, device
        self.stream = torch.cuda.Stream(device) if beside and device.type == "cuda" else None
        self.done: deque[torch.cuda.Event] = deque()  # one for each of the last batches: the step before it is done

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images float32 (N,3,H,W) normalised RGB and labels int64 (N,H,W), for use on the current stream."""
        if self.stream is None:
            return prepare_batch(batch, self.mean, self.std, self.device)
        main = torch.cuda.current_stream(self.device)
        self.done.append(main.record_event(torch.cuda.Event(blocking=True)))  # blocking: frees the core for the loader
        if len(self.done) > AHEAD:
            self.done.popleft().synchronize()
        with torch.cuda.stream(self.stream):
            prepared = prepare_batch(batch, self.mean, self.std, self.device)
        main.wait_stream(self.stream)  # the GPU waits, not the program
        for tensor in prepared:
            # Otherwise the allocator would reuse its memory for the next batch while the network still reads it.
            tensor.record_stream(main)
        return prepared
