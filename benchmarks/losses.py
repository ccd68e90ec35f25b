"""SSA's training losses against their plain formulation: peak memory and time of forward + backward on a feature.

    python benchmarks/losses.py            # writes benchmarks/results/losses.json
    python benchmarks/losses.py --smoke    # small and quick, writes nothing

150 classes, images of 512×512, feature 160×64×64; batch 4 on a CPU with 2 threads; also batch 16 on a GPU if there is
one. The plain side, in this file, works as the official code does: the full-resolution logits of all images together,
`F.interpolate` and `F.cross_entropy`, loops over the classes present, OpenCV's edges on the CPU. Both sides run in turn
and must agree in every loss and in the gradient. On a CPU, the peak of each side is that of a new process.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssaseg.models.classifiers.losses import IGNORE, cosine, cosine_logits
from ssaseg.models.classifiers.ssa import SSAClassifier

RESULTS = Path(__file__).parent / "results" / "losses.json"
TOLERANCE = 1e-4
GROUP = 4
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """What is measured."""

    device: str
    batch: int
    classes: int = 150
    channels: int = 160
    image: int = 512  # side [pixels]
    feature: int = 64  # side [pixels]
    threads: int = 2
    rounds: int = 5

    def inputs(self) -> tuple[SSAClassifier, Tensor, Tensor]:
        """Classifier, feature that takes a gradient, labels with 64 patches of 12 classes per image, 5 % ignored."""
        torch.manual_seed(0)
        classifier = SSAClassifier(self.channels, self.classes, 0.0, group=GROUP)
        torch.nn.init.normal_(classifier.conv_seg.weight, 0.0, 0.1)
        feature = torch.randn(self.batch, self.channels, self.feature, self.feature).relu()
        some = torch.stack([torch.randperm(self.classes)[:12] for _ in range(self.batch)])
        patches = some.gather(1, torch.randint(0, 12, (self.batch, 64))).unflatten(1, (8, 8))
        labels = patches.repeat_interleave(self.image // 8, 1).repeat_interleave(self.image // 8, 2)
        labels[torch.rand(labels.shape) < 0.05] = IGNORE
        return classifier.to(self.device), feature.to(self.device).requires_grad_(), labels.to(self.device)


# ---- the plain side ----------------------------------------------------------------------------------------------


def plain_losses(classifier: SSAClassifier, feature: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Weighted losses by name, as `SSAClassifier.training_step`."""
    student = classifier.adapt(feature)
    small = F.interpolate(labels[:, None].float(), feature.shape[2:], mode="nearest")[:, 0].long()
    parts: list[dict[str, Tensor]] = []
    teachers = []
    for group in range(0, len(labels), GROUP):
        of = slice(group, group + GROUP)
        semantic, spatial, prototypes = classifier.teacher(
            (batch_means(feature[of], small[of], classifier.semantic_prototypes), classifier.semantic_prototypes),
            (image_means(student.spatial_feature[of], small[of], classifier.spatial_prototypes),
             classifier.spatial_prototypes),
        )  # fmt: skip
        teacher = cosine_logits(student.feature[of], prototypes)
        semantic = semantic.expand(len(teacher), -1, -1)
        parts.append(
            {
                "response": response(student.logits[of], teacher.detach(), small[of]),
                "semantic": relations(student.semantic[of], semantic.detach()),
                "spatial": -(spatial.detach().softmax(2) * student.spatial[of].log_softmax(2)).sum(2).mean(),
            }
        )
        teachers.append(teacher)
    found = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
    for name, logits in (("main", student.logits), ("coarse", student.coarse), ("teacher", torch.cat(teachers))):
        large = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True)
        entropies = [entropy(*part, everything=name == "main") for part in zip(*split(large, labels), strict=True)]
        found[f"{name}_ce"] = torch.stack(entropies).mean()
        if name != "coarse":
            found[f"{name}_dice"] = dice(large, labels)
    return {name: loss.weight * found[name] for name, loss in SSAClassifier.LOSSES.items()}


def split(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.split(GROUP) for tensor in tensors]


def entropy(logits: Tensor, labels: Tensor, everything: bool) -> Tensor:
    """Mean cross entropy, over all pixels or over those that are not ignored."""
    if everything:
        return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none").mean()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE)


def present(labels: Tensor) -> list[int]:
    return [k for k in labels.unique().tolist() if k != IGNORE]


def dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the (image, class) pairs of the batch."""
    dices = []
    for image, label in zip(logits, labels, strict=True):
        classes = present(label)
        masks = torch.stack([label == k for k in classes]).float().flatten(1)
        p = image[classes].sigmoid().flatten(1)
        dices.append(1 - (2 * (p * masks).sum(1) + 1) / (p.sum(1) + masks.sum(1) + 1))
    return torch.cat(dices).mean()


def batch_means(feature: Tensor, labels: Tensor, fallback: Tensor) -> Tensor:
    """Mean feature of each class over all images, (K,C)."""
    means = list(fallback.detach())
    pixels = feature.movedim(1, 3)
    for k in present(labels):
        means[k] = pixels[labels == k].mean(0)
    return torch.stack(means)


def image_means(feature: Tensor, labels: Tensor, fallback: Tensor) -> Tensor:
    """Mean feature of each class in each image, (N,K,C)."""
    pairs = zip(feature, labels, strict=True)
    return torch.stack([batch_means(image[None], label[None], fallback) for image, label in pairs])


def relations(student: Tensor, teacher: Tensor) -> Tensor:
    mine, theirs = ((15 * cosine(x, x.detach())).softmax(2) for x in (student, teacher))
    others = 1 - torch.eye(student.shape[1], device=student.device)
    return ((mine - theirs).clamp(min=0) * others).sum(2).mean()


def response(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """For each class, entropy-weighted means over boundary and interior; the boundary is computed on the CPU."""
    valid = labels != IGNORE
    one_hot = F.one_hot(torch.where(valid, labels, 0), logits.shape[1]).movedim(3, 1)
    probability = teacher.softmax(1)
    loss = -((0.5 * probability + 0.5 * one_hot) * logits.log_softmax(1)).sum(1)
    weight = -(probability * (probability + 1e-12).log()).sum(1) * valid
    edges = torch.stack([edge(label) for label in labels.cpu().numpy()]).to(labels.device)
    losses = []
    for k in present(labels):
        sides = [(labels == k) & edges, (labels == k) & ~edges]
        losses.append(sum((loss * weight)[side].sum() / (weight[side].sum() + 1e-12) for side in sides) / 2)
    return torch.stack(losses).mean()


def edge(label: np.ndarray) -> Tensor:
    found = cv2.Canny(label.astype(np.uint8), 0.1, 0.2)
    framed = np.zeros_like(found)
    framed[6:-6, 6:-6] = found[6:-6, 6:-6]
    return torch.from_numpy(cv2.dilate(framed, np.ones((3, 3), np.uint8)) > 0)


# ---- measuring ---------------------------------------------------------------------------------------------------


def our_losses(classifier: SSAClassifier, feature: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The losses of the package."""
    return classifier.training_step(feature, labels).losses


SIDES: dict[str, Callable[[SSAClassifier, Tensor, Tensor], dict[str, Tensor]]] = {
    "ours": our_losses,
    "plain": plain_losses,
}


def run(side: str, inputs: tuple[SSAClassifier, Tensor, Tensor]) -> tuple[dict[str, float], Tensor, float]:
    """One forward and backward: losses, the feature's gradient, seconds."""
    classifier, feature, labels = inputs
    feature.grad = None
    classifier.zero_grad()
    wait(feature)
    start = time.perf_counter()
    losses = SIDES[side](classifier, feature, labels)
    sum(losses.values()).backward()
    wait(feature)
    seconds = time.perf_counter() - start
    assert feature.grad is not None
    return {name: value.item() for name, value in losses.items()}, feature.grad, seconds


def wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def peak_here(side: str, case: Case) -> float:
    """Memory [MiB] that one run needs in addition to its inputs. On a CPU, call it in a new process."""
    inputs = case.inputs()
    if case.device == "cuda":
        run(side, inputs)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(side, inputs)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    # A small case first sets up threads and kernels, so that they do not count.
    run(side, Case("cpu", 1, 12, 8, 64, 16).inputs())
    before = resident("VmRSS")
    run(side, inputs)
    return resident("VmHWM") - before


def resident(key: str) -> float:
    """Resident memory of this process [MiB]: now (VmRSS), or the largest so far (VmHWM).

    From Linux's /proc, since `getrusage` also counts the peak of the parent process.
    """
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def peak(side: str, case: Case) -> float:
    """`peak_here`; on a CPU, in a new process."""
    if case.device == "cuda":
        return peak_here(side, case)
    words = [sys.executable, __file__, "--peak-of", side, "--case", json.dumps(asdict(case))]
    return float(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(case: Case) -> dict[str, Any]:
    """Runs both sides in turn: times, peaks, their ratios, and the differences of the results."""
    inputs = case.inputs()
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    losses, gradients = {}, {}
    for turn in range(case.rounds + 1):  # the first warms up
        for side, times in seconds.items():
            losses[side], gradients[side], spent = run(side, inputs)
            gradients[side] = gradients[side].clone()
            if turn:
                times.append(spent)
    loss_error = max(abs(losses["ours"][name] / value - 1) for name, value in losses["plain"].items())
    difference = gradients["ours"] - gradients["plain"]
    gradient_error = (difference.norm() / gradients["plain"].norm()).item()
    del inputs, gradients, difference
    sides = {
        side: {"median_s": statistics.median(times), "all_s": times, "peak_MiB": peak(side, case)}
        for side, times in seconds.items()
    }
    ours, plain = sides["ours"], sides["plain"]
    return {
        "case": asdict(case),
        "dtype": "float32",
        "sides": sides,
        "plain_over_ours": {
            "time": plain["median_s"] / ours["median_s"],
            "peak": plain["peak_MiB"] / max(ours["peak_MiB"], 1e-9),
        },
        "largest_relative_difference": {"loss": loss_error, "feature_gradient": gradient_error},
    }


def main() -> int:
    """Measures, prints, writes; returns 1 if the sides disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small and quick; writes nothing")
    parser.add_argument("--peak-of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    small = {"classes": 19, "channels": 16, "image": 128, "feature": 16, "rounds": 2} if options.smoke else {}
    cases = [Case("cpu", 4, **small)] + [Case("cuda", 16, **small)] * torch.cuda.is_available()
    torch.set_num_threads(cases[0].threads)
    if options.peak_of:
        print(peak_here(options.peak_of, Case(**options.case)))
        return 0
    versions = {"python": platform.python_version(), "torch": torch.__version__, "opencv": cv2.__version__}
    # On a machine without a GPU, the figures from a machine with a GPU are kept.
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    agree = True
    for case in cases:
        result = measure(case)
        device = torch.cuda.get_device_name() if case.device == "cuda" else platform.processor() or platform.machine()
        results[case.device] = {"command": "python benchmarks/losses.py", "versions": versions, "on": device, **result}
        for side, found in result["sides"].items():
            print(f"{case.device:5} {side:6} {found['median_s'] * 1e3:8.1f} ms  peak {found['peak_MiB']:8.0f} MiB")
        ratio, apart = result["plain_over_ours"], result["largest_relative_difference"]
        print(f"{case.device:5} plain/ours: time {ratio['time']:.2f}, peak {ratio['peak']:.1f}; apart {apart}")
        agree &= max(apart.values()) < TOLERANCE
    if not options.smoke:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print("the sides agree" if agree else f"the sides DISAGREE by more than {TOLERANCE}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
