"""Batches on their way to the device: on a GPU copied and prepared beside the step that it still computes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssaseg.datasets.colour import prepare_batch
from ssaseg.datasets.loader import Batch


class Preparer:
    """`prepare_batch`, on a CUDA stream of its own where `beside` is true and there is one.

    The program runs ahead of a GPU: when it asks for a batch, the step before is queued but not yet computed. On the
    main stream the batch would queue behind it; on its own it is copied, distorted and normalised meanwhile.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device, beside: bool) -> None:
        self.mean, self.std, self.device = mean, std, device
        self.stream = torch.cuda.Stream(device) if beside and device.type == "cuda" else None

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images float32 (N,3,H,W) normalised RGB and labels int64 (N,H,W), to be used on the current stream."""
        if self.stream is None:
            return prepare_batch(batch, self.mean, self.std, self.device)
        with torch.cuda.stream(self.stream):
            prepared = prepare_batch(batch, self.mean, self.std, self.device)
        main = torch.cuda.current_stream(self.device)
        main.wait_stream(self.stream)  # the GPU waits, not the program
        for tensor in prepared:
            # Otherwise the allocator would hand its memory to the next batch while the network still reads it.
            tensor.record_stream(main)
        return prepared
