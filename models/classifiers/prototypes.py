"""What classifiers with several prototypes per class share: scores, assignment of pixels, and memories of pixels.

ProtoSeg, GMMSeg and DNC compare a pixel with M prototypes per class. The best of a class is its score, and a LayerNorm
over the classes turns the scores into logits. In training, Sinkhorn's iterations assign the pixels of a class evenly to
its prototypes. No function here waits for the device, and none has a loop over classes.

Axes: N images, K classes, M prototypes per class, D channels of the embedding, h×w feature pixels, P = h·w, n pixels of
several images, R segments (a class, or one prototype of a class), S samples.
"""

import math
import os
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ssaseg.models.classifiers import losses
from ssaseg.models.classifiers.base import Classifier, LossOptions, TrainingStep

SINKHORN_STEPS = 3
SINKHORN_EPSILON = 0.05
MOST_PROTOTYPES = 65_535  # K·M: enough for any published setting; more is a typing error


class Scored(NamedTuple):
    """Training's results for one batch."""

    logits: Tensor  # (N,K,h,w)
    embedding: Tensor  # (N,P,D) unit vectors
    labels: Tensor  # (N,P) at the feature's resolution
    members: Tensor  # (G,N)
    component: Tensor  # (N,P) the assigned prototype in [0, M); any value at ignored pixels
    correct: Tensor  # (N,P) whether the logits give the label; False at ignored pixels
    assignment: Tensor  # (N,P,M) Sinkhorn's shares of the prototypes
    contrast: Tensor  # (N,) cross entropy over all K·M scores, summed over the pixels that count
    counted: Tensor  # (N,) how many pixels count
    distance: Tensor  # (N,) sum of (1 − score of the assigned prototype)²


class PrototypeClassifier(Classifier):
    """The base of ProtoSeg, GMMSeg and DNC. A subclass has `table`, `score`, `unweighted`, `observe` and `update`.

    `count` is M, `width` is D. All arithmetic is float32, under autocast too: exp(cosine / 0.05) exceeds float16. What
    is as large as pixels × prototypes exists for one image at a time, and is computed again in the backward pass.
    """

    uses_groups = True
    assigns: ClassVar[bool] = True  # whether a step assigns its own pixels to prototypes
    OFFICIAL_FILES: ClassVar[bool] = False  # ProtoSeg's and GMMSeg's are of networks that are not here

    def __init__(
        self,
        channels: int,
        num_classes: int,
        dropout: float,
        loss: LossOptions | None,
        group: int,
        count: int,
        width: int,
        projection: nn.Module | None,
    ) -> None:
        super().__init__(channels, num_classes, dropout, loss, group)
        if num_classes * count > MOST_PROTOTYPES:
            raise ValueError(
                f"{num_classes} classes with {count} prototypes each are {num_classes * count:,} prototypes, expected "
                f"at most {MOST_PROTOTYPES:,}\nchoose at most {MOST_PROTOTYPES // num_classes} per class"
            )
        self.count, self.width = count, width
        self.projection = projection or nn.Identity()
        self.feat_norm = nn.LayerNorm(width)
        self.mask_norm = nn.LayerNorm(num_classes)

    def table(self) -> tuple[Tensor, ...]:
        """The prototypes as tensors whose last axes are (K,M), for `score`. They have no gradients."""
        raise NotImplementedError

    def score(self, embedding: Tensor, table: tuple[Tensor, ...]) -> Tensor:
        """How near pixels (…,D) are to prototypes whose table has the last axis (k,) → (…,k)."""
        raise NotImplementedError

    def nearness(self, own: Tensor, labels: Tensor) -> Tensor:
        """What Sinkhorn gets: scores of the own class's prototypes (n,M), labels (n,) in [0, K) → (n,M) in [−1, 1]."""
        return own

    def embed(self, feature: Tensor) -> Tensor:
        """(N,C,h,w) float32 → unit vectors of the pixels (N,P,D)."""
        projected = self.projection(self.dropout(feature)).flatten(2).transpose(1, 2)
        return F.normalize(self.feat_norm(projected), dim=-1)

    def forward(self, feature: Tensor) -> Tensor:
        """(N,C,h,w) → logits (N,K,h,w), float32. All prototypes together would need M times the memory."""
        with torch.autocast(feature.device.type, enabled=False):
            embedding, table = self.embed(feature.float()), self.table()
            best: Tensor | None = None
            for component in range(self.count):
                score = self.score(embedding, tuple(each[..., component] for each in table))  # (N,P,K)
                best = score if best is None else torch.maximum(best, score)
            assert best is not None
            return self.mask_norm(best).transpose(1, 2).unflatten(2, feature.shape[-2:])

    @property
    def contrasts(self) -> bool:
        """Whether a loss compares a pixel with the prototypes of all classes."""
        return bool(self.weights.get("contrast") or self.weights.get("distance"))

    def training_step(self, feature: Tensor, labels: Tensor, totals: Tensor | None = None) -> TrainingStep:
        """Logits and weighted losses; labels (N,H,W): integers in [0, K) or 255 = ignored."""
        with torch.autocast(feature.device.type, enabled=False):
            scored = self.compare(feature, labels)
            terms = {name: self.weights[name] * loss for name, loss in self.unweighted(scored, labels).items()}
            with torch.no_grad():
                return TrainingStep(scored.logits, terms, self.observe(scored))

    def unweighted(self, scored: Scored, labels: Tensor) -> dict[str, Tensor]:
        """The losses whose weight is not 0."""
        raise NotImplementedError

    def observe(self, scored: Scored) -> Any:
        """What `update` needs of a micro-batch."""
        raise NotImplementedError

    def compare(self, feature: Tensor, labels: Tensor) -> Scored:
        """Logits, assignment and contrast of a batch in training. feature (N,C,h,w), labels (N,H,W).

        Without `assigns`, no pixel is assigned: the assignment is empty, and the component is 0.
        """
        size = feature.shape[-2:]
        embedding = self.embed(feature.float())
        table = tuple(each.flatten(-2) for each in self.table())  # last axis K·M
        small = losses.resize_labels(labels, size).flatten(1)
        members = losses.group_matrix(len(labels), self.group, feature.device)
        with torch.no_grad():
            assignment = self._assign(embedding, small, table) if self.assigns else embedding.new_zeros(*small.shape, 1)
            component = assignment.argmax(dim=-1)
            target = torch.where(small == losses.IGNORE, -1, small * self.count + component)
        found = [
            checkpoint(self._compare_image, *image, table, use_reentrant=False, preserve_rng_state=False)
            for image in zip(embedding, target, strict=True)
        ]
        best, contrast, distance = (torch.stack(each) for each in zip(*found, strict=True))
        logits = self.mask_norm(best)  # (N,P,K)
        correct = logits.argmax(dim=-1) == small
        as_map = logits.transpose(1, 2).unflatten(2, size)
        counted = self.counted(target).sum(dim=1).float()
        return Scored(as_map, embedding, small, members, component, correct, assignment, contrast, counted, distance)

    def _assign(self, embedding: Tensor, labels: Tensor, table: tuple[Tensor, ...]) -> Tensor:
        """Sinkhorn's shares within each group of images: (N,P,D), labels (N,P) → (N,P,M)."""
        own = torch.stack([self._own(*image, table) for image in zip(embedding, labels, strict=True)])
        groups = []
        for scores, known in zip(own.split(self.group), labels.split(self.group), strict=True):
            flat = known.flatten()
            shares = sinkhorn(self.nearness(scores.flatten(0, 1), flat), flat, self.num_classes)
            groups.append(shares.view_as(scores))
        return torch.cat(groups)

    def _own(self, embedding: Tensor, labels: Tensor, table: tuple[Tensor, ...]) -> Tensor:
        """Scores of the prototypes of each pixel's own class, for one image: (P,D), (P,) → (P,M)."""
        scores = self.score(embedding, table).unflatten(1, (self.num_classes, self.count))
        index = known_labels(labels)[0][:, None, None].expand(-1, 1, self.count)
        return scores.gather(1, index).squeeze(1)

    def _compare_image(
        self, embedding: Tensor, target: Tensor, table: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One image: the best score of each class (P,K), and the sums of `contrast` and `distance`.

        target (P,): the number of the assigned prototype in [0, K·M); −1 at pixels that do not count.
        """
        scores = self.score(embedding, table)  # (P,K·M)
        best = scores.unflatten(1, (self.num_classes, self.count)).amax(dim=-1)
        if not self.contrasts:
            return best, best.new_zeros(()), best.new_zeros(())
        own = scores.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
        contrast = ((scores.logsumexp(dim=1) - own) * self.counted(target)).sum()
        distance = ((1 - own).square() * (target >= 0)).sum()
        return best, contrast, distance

    def counted(self, target: Tensor) -> Tensor:
        """Which pixels `contrast` counts, from their targets (…): those that are not ignored."""
        return target >= 0

    def mean_over_pixels(self, sums: Tensor, scored: Scored) -> Tensor:
        """Mean over the groups of the mean over the pixels that are not ignored. (N,) → scalar."""
        valid = (scored.labels != losses.IGNORE).sum(dim=1).float()
        return losses.group_ratio(sums, valid, scored.members)

    def extra_repr(self) -> str:
        return f"prototypes={self.num_classes}×{self.count}, width={self.width}"


def new_prototypes(num_classes: int, count: int, width: int) -> Tensor:
    """(K,M,D), N(0, 0.02²), cut at ±2, as in ProtoSeg and GMMSeg."""
    return nn.init.trunc_normal_(torch.empty(num_classes, count, width), std=0.02)


def new_bank(*shape: int, samples: int) -> Tensor:
    """An uninitialised float32 memory (…,T,D), which gets up to `samples` entries at once.

    Raises ValueError if T is less than that, or if it is larger than the machine's memory.
    """
    if samples > shape[-2]:
        raise ValueError(
            f"samples is {samples}, more than the memory of {shape[-2]}\nchoose samples={shape[-2]} or less"
        )
    needed = math.prod(shape) * 4
    if torch.get_default_device().type == "cpu" and hasattr(os, "sysconf"):
        installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > installed:
            raise ValueError(
                f"the memory of pixels needs {needed / 1e9:.1f} GB, and the machine has {installed / 1e9:.1f} GB\n"
                "choose a smaller model.options.memory"
            )
    return torch.empty(shape)


def one_hot(index: Tensor, number: int) -> Tensor:
    """(…) in [0, number) → (…,number) float32. `F.one_hot` reads the values on some devices."""
    return (index.unsqueeze(-1) == torch.arange(number, device=index.device)).float()


def known_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels with 0 for ignored pixels, int64, and whether each is not ignored."""
    valid = labels != losses.IGNORE
    return torch.where(valid, labels, 0).long(), valid


def sinkhorn(nearness: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Shares of each pixel among the prototypes of its class, about the same number of pixels for each prototype.

    nearness (n,M) in [−1, 1], labels (n,) in [0, K) or 255 → (n,M), 0 at ignored pixels; sums to 1 for each other
    pixel. The classes are treated separately, all in the same operations. Source: `distributed_sinkhorn` of ProtoSeg.
    """
    index, valid = known_labels(labels)
    kept = valid.float().unsqueeze(1)
    of_class = one_hot(index, num_classes) * kept  # (n,K)
    pixels = of_class.sum(dim=0)[index].unsqueeze(1).clamp(min=1.0)  # (n,1) of the pixel's class

    def per_class(values: Tensor) -> Tensor:
        """Sums over the pixels of each pixel's class; 1 instead of 0. (n,·) → (n,·)."""
        sums = (of_class.T @ values)[index]
        return torch.where(sums > 0, sums, 1.0)

    shares = (nearness / SINKHORN_EPSILON).exp() * kept
    shares = shares / per_class(shares.sum(dim=1, keepdim=True))
    for _ in range(SINKHORN_STEPS):
        shares = shares / per_class(shares) / nearness.shape[1]
        sums = shares.sum(dim=1, keepdim=True)
        shares = shares / torch.where(sums > 0, sums, 1.0) / pixels
    return shares * pixels


class Samples(NamedTuple):
    """Positions of pixels, at most S for each of R segments."""

    positions: Tensor  # (R,S) in [0, n)
    number: Tensor  # (R,) how many of the S count, from the first


def evenly(segments: Tensor, number: int, most: int) -> Samples:
    """Up to `most` pixels of each segment, at even distances in their order.

    segments (n,): in [0, number), or `number` for pixels of none. Positions are those of `torch.linspace` from the
    first to the last, as in GMMSeg. No value is read on the host.
    """
    order = segments.argsort(stable=True)
    bounds = torch.searchsorted(segments[order], torch.arange(number + 1, device=segments.device))
    starts, sizes = bounds[:-1], bounds.diff()
    slots = torch.arange(most, device=segments.device)
    step = (sizes - 1).double().unsqueeze(1) / max(most - 1, 1)
    last = (sizes - 1).unsqueeze(1)
    spread = torch.where(slots < (most + 1) // 2, (step * slots), last - step * (most - 1 - slots)).long()
    place = torch.where(sizes.unsqueeze(1) > most, spread, slots)
    found = order[(starts.unsqueeze(1) + place).clamp(max=len(order) - 1)]
    return Samples(found, sizes.clamp(max=most))


def write_ring(ring: Tensor, pointer: Tensor, values: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the first `count` values of each ring at its pointer, and moves the pointers; both change in place.

    ring (R,T,D), pointer (R,), values (R,S,D) with S ≤ T, count (R,) ≤ S. Returns what the rings held there before, and
    what they hold now, both (R,S,D); equal where nothing was written.
    """
    slots = torch.arange(values.shape[1], device=ring.device)
    place = ((pointer.unsqueeze(1) + slots) % ring.shape[1]).unsqueeze(2).expand_as(values)
    old = ring.gather(1, place)
    new = torch.where((slots < count.unsqueeze(1)).unsqueeze(2), values.to(ring.dtype), old)
    ring.scatter_(1, place, new)
    pointer.copy_((pointer + count) % ring.shape[1])
    return old, new


def gathered(memories: list[Any], field: int, peers: Any) -> Tensor:
    """One tensor of all micro-batches and ranks, joined along the first axis, in the order of the ranks."""
    return torch.cat(peers.gather(torch.cat([memory[field] for memory in memories])))
