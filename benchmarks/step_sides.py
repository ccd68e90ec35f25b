"""The sides of step.py: a training step of the same network under one classifier's losses, in several forms.

`linear` and `ssa` are the package's forward, losses, backward and optimiser. No side has the rest of a training step,
such as the guard and the gradient's norm. `plain` is ssa with the losses of losses.py, which work as the official code
does: full-resolution logits of all images together, Python loops over the classes present, OpenCV's edges on the CPU.
Sides with the name of another classifier are its whole step, with the update of its memory and prototypes.
Forms of the first two, all on a GPU: `compiled` (as train.compile), `graph` (the whole step is replayed as one CUDA
graph), `fed` (the batch is copied and prepared for each step), `prefetched` (the same on a separate stream).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from losses import GROUP, plain_losses
from torch import Tensor

from ssaseg.datasets.loader import Batch
from ssaseg.datasets.prefetch import Preparer
from ssaseg.datasets.transforms import DRAWS
from ssaseg.models import CLASSIFIERS, build_model
from ssaseg.models.classifiers.base import Alone
from ssaseg.models.classifiers.losses import IGNORE

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
PRESENT, PATCHES = 12, 8  # largest number of classes in an image; number of one-class patches along a side
RIVALS = ("cac", "protoseg", "gmmseg", "dnc")
OPTIONS = {"gmmseg": {"memory": 1000}}  # its update reads what changes, not the whole memory: 32,000 would cost no time
CPU_SIDES = ("ssa", "linear", "plain", *RIVALS)
CUDA_SIDES = (
    *CPU_SIDES,
    "ssa compiled",
    "linear compiled",
    "ssa graph",
    "linear graph",
    "ssa compiled graph",
    "linear compiled graph",
    "ssa fed",
    "ssa prefetched",
)


@dataclass(frozen=True)
class Case:
    """What is measured."""

    device: str
    batch: int
    classes: int = 150
    image: int = 512  # side [pixels]
    model: str = "seaformer_b"
    amp: str = "off"  # or bf16
    threads: int = 2
    rounds: int = 5
    steps: int = 1  # steps in a side's turn; on a GPU they are queued without waits between them


def make_batch(case: Case) -> Batch:
    """Random pixels, and labels with 8×8 patches of up to 12 classes per image; 5 % of the pixels are ignored."""
    torch.manual_seed(0)
    size = (case.batch, case.image, case.image)
    present = min(PRESENT, case.classes)
    some = torch.stack([torch.randperm(case.classes)[:present] for _ in range(case.batch)])
    patches = some.gather(1, torch.randint(0, present, (case.batch, PATCHES**2))).unflatten(1, (PATCHES, PATCHES))
    side = case.image // PATCHES
    labels = patches.repeat_interleave(side, 1).repeat_interleave(side, 2)
    labels[torch.rand(labels.shape) < 0.05] = IGNORE
    images = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
    # Brightness, contrast, saturation and hue, for half of the images.
    draws = torch.tensor([20.0, 1.2, 1.1, 5.0, torch.nan][:DRAWS]).repeat(case.batch, 1)
    draws[::2] = torch.nan
    sizes = torch.tensor([[case.image, case.image]] * case.batch)
    return Batch(images, labels.to(torch.uint8), draws, sizes, [""] * case.batch, list(range(case.batch)))


class Side:
    """A network, its optimiser and a batch on the device; `step()` is one training step, without waits."""

    def __init__(self, name: str, case: Case) -> None:
        self.name, self.case = name, case
        kind, *forms = name.split()
        self.device = torch.device(case.device)
        torch.manual_seed(0)
        classifier = kind if kind in CLASSIFIERS else "ssa"
        self.model = build_model(case.model, case.classes, classifier, group=GROUP, options=OPTIONS.get(classifier))
        if hasattr(self.model.classifier, "conv_seg"):
            # With the usual initialisation the rows are so similar that some losses would be almost zero.
            torch.nn.init.normal_(self.model.classifier.conv_seg.weight, 0.0, 0.1)
        self.memory: Any = None
        self.model.to(self.device)
        if "compiled" in forms:  # as train.compile does
            self.model.backbone.compile(dynamic=False)
            self.model.decoder.compile(dynamic=False)
        self.captured = "graph" in forms
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, weight_decay=0.01, fused=True, capturable=self.captured
        )
        self.batch = make_batch(case)
        prepare = Preparer(MEAN, STD, self.device, beside="prefetched" in forms)
        self.images, self.labels = prepare(self.batch)
        if forms and forms[0] in ("fed", "prefetched"):
            self.batch = Batch(*(t.pin_memory() if isinstance(t, Tensor) else t for t in self.batch))
            self.feed: Callable[[], Any] = lambda: prepare(self.batch)
        else:
            self.feed = lambda: (self.images, self.labels)
        self.plain = kind == "plain"
        if self.captured:
            self.step = self.capture()  # type: ignore[method-assign]

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Weighted losses by name."""
        return self.losses_of(self.feature(images), labels)

    def feature(self, images: Tensor) -> Tensor:
        """The feature that the classifier takes."""
        with self.autocast():
            return self.model.feature(images)

    def losses_of(self, feature: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Losses of a feature. Both formulations compute in float32, also if the network does not."""
        if self.plain:
            return plain_losses(self.model.classifier, feature.float(), labels)  # type: ignore[arg-type]
        with self.autocast():
            step = self.model.classifier.training_step(feature, labels)
        self.memory = step.memory
        return step.losses

    def autocast(self) -> torch.autocast:
        # A graph must not use a tensor that the cache of casts would free.
        enabled = self.case.amp != "off"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=not self.captured)

    def step(self) -> dict[str, Tensor]:
        """Forward, backward, update; returns the losses."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.losses(*self.feed())
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()
        if self.memory is not None:
            with torch.no_grad():
                self.model.classifier.update([self.memory], Alone(), torch.zeros((), device=self.device))
        return losses

    def capture(self) -> Callable[[], dict[str, Tensor]]:
        """The step as one CUDA graph."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # tuning, compiling and the optimiser's state are outside the graph
            for _ in range(3):
                Side.step(self)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            losses = Side.step(self)

        def replay() -> dict[str, Tensor]:
            graph.replay()
            return losses

        return replay

    def wait(self) -> None:
        """Waits until everything in the queue is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
