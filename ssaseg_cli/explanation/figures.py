"""The numbers of `explain.json`, from the sums over all images.

Axes: K classes, B bins of distance. In matrices (K,K) rows are labels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ssaseg.cli.explanation.sums import EDGES, QUANTITIES, Sums
from ssaseg.cli.scoring.metrics import nan_mean, percent

PAIRS = 40  # most pairs of classes in the report, of each comparison

ACTIVATION = (
    "confidence (drawn as activation): softmax probability of the class, 0 to 1. Logits have another range in each "
    "classifier: those of SSA are 15 times a cosine, those of others have no limit. A classifier that is surer in "
    "general has a higher confidence everywhere; two other numbers show if there is more to it. strength: the class's "
    "logit minus its mean over the image, divided by its standard deviation. agreement: share of pixels that get the "
    "mask's label"
)
RIM = (
    "rim: pixels of a mask that are at most 2 % of the image's diagonal away from a pixel with another label, by the "
    "Euclidean distance; pixels without label count as another label; the image's border is no edge. middle: the rest. "
    "Boundary IoU has the same width, but the maximum norm, the border as an edge, and no edge at pixels without label"
)


def figures(sums: Sums, classes: Sequence[str]) -> dict[str, Any]:
    """Everything in the report that follows from the sums. Values without pixels are None."""
    report: dict[str, Any] = {
        "images": sums.images,
        "activation": ACTIVATION,
        "rim_and_middle": {"definition": RIM, **rim_and_middle(sums, classes)},
        "confidence_by_distance": by_distance(sums),
        "changes": [changes(sums, pair, classes) for pair in sums.comparisons],
        "prototypes": prototypes(sums, classes),
    }
    if sums.known:
        report["scores"] = {name: scores(matrix) for name, matrix in sums.confusion.items()}
    return report


def number(value: Any, digits: int = 6) -> float | None:
    """A number for JSON: rounded, and None for NaN."""
    return None if np.isnan(value) else round(float(value), digits)


def ratio(part: Any, whole: Any) -> float | None:
    """part / whole; None for 0 / 0."""
    return number(percent(part, whole) / 100)


def scores(matrix: np.ndarray) -> dict[str, float | None]:
    """mIoU and accuracy over all pixels [%] of a confusion matrix (K,K)."""
    right = matrix.diagonal()
    iou = percent(right, matrix.sum(axis=0) + matrix.sum(axis=1) - right)
    return {"mIoU": number(nan_mean(iou), 4), "aAcc": number(percent(right.sum(), matrix.sum()), 4)}


def by_distance(sums: Sums) -> list[dict[str, Any]]:
    """The means `QUANTITIES` of each classifier in each bin of distance that has pixels."""
    pixels = sums.pixels.sum(axis=(0, 1))
    ends = [*EDGES[1:], None]
    return [
        {
            "from": EDGES[b],
            "below": ends[b],
            "pixels": int(pixels[b]),
            **{
                key: {name: ratio(sums.totals[key][name][:, :, b].sum(), pixels[b]) for name in sums.stages}
                for key in QUANTITIES
            },
        }
        for b in range(len(EDGES))
        if pixels[b]
    ]


def rim_and_middle(sums: Sums, classes: Sequence[str]) -> dict[str, Any]:
    """The means `QUANTITIES` in rims and in middles: over all pixels, for each class, and the mean over classes."""
    pixels = sums.pixels.sum(axis=2)  # (K,2)

    def parts(chosen: Any) -> dict[str, Any]:
        """`chosen`: rows of classes."""
        cells: dict[str, Any] = {}
        for side, part in enumerate(("rim", "middle")):
            whole = pixels[chosen, side].sum()
            cells[part] = {
                "pixels": int(whole),
                **{
                    key: {name: ratio(sums.totals[key][name][chosen, side].sum(), whole) for name in sums.stages}
                    for key in QUANTITIES
                },
            }
        return cells

    rows = [{"name": name, **parts([k])} for k, name in enumerate(classes) if pixels[k].any()]
    mean = {
        part: {
            key: {name: mean_of([row[part][key][name] for row in rows]) for name in sums.stages} for key in QUANTITIES
        }
        for part in ("rim", "middle")
    }
    return {"all_pixels": parts(slice(None)), "mean_of_classes": mean, "classes": rows}


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are not None; None if there are none."""
    return number(nan_mean(np.array(values, float)))


def changes(sums: Sums, pair: tuple[str, str], classes: Sequence[str]) -> dict[str, Any]:
    """What the second classifier of a comparison does differently; with known labels, what is better and worse."""
    first, second = pair
    report: dict[str, Any] = {"from": first, "to": second, "pixels_changed": int(sums.changed[pair])}
    if not sums.known:
        return report
    fixed, broken = sums.fixed[pair], sums.broken[pair]
    better, worse = int(fixed.sum()), int(broken.sum())
    before, after = sums.confusion[first], sums.confusion[second]
    gain = fixed - broken
    # Those that gain most first, then those that lose; pairs that are as before are left out.
    order = np.argsort(-np.abs(gain), axis=None, kind="stable")[:PAIRS]
    pairs = [divmod(int(cell), len(classes)) for cell in order if gain.flat[cell]]
    return report | {
        "pixels_labelled": int(before.sum()),
        "better": better,
        "worse": worse,
        "wrong_both_times": int(sums.changed[pair]) - better - worse,
        "classes": [
            {"name": name, "better": int(fixed[k].sum()), "worse": int(broken[k].sum()), "pixels": int(before[k].sum())}
            for k, name in enumerate(classes)
            if before[k].any()
        ],
        # `fixed`: first said `predicted`, second is right; `broken`: the reverse; before and after: all such errors.
        "pairs": [
            {
                "true": classes[t],
                "predicted": classes[p],
                "fixed": int(fixed[t, p]),
                "broken": int(broken[t, p]),
                "before": int(before[t, p]),
                "after": int(after[t, p]),
            }
            for t, p in sorted(pairs, key=lambda cell: -int(gain[cell]))
        ],
        "both_ways": both_ways(before, after, classes),
    }


def both_ways(before: np.ndarray, after: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Pairs of classes, with the pixels of one that are labelled as the other, before and after: int (K,K) each.

    A classifier that only prefers the rarer class of two has fewer errors one way and more the other way; these sums
    show whether the two are told apart better. Those that gain most first, then those that lose.
    """
    sums = [np.triu(matrix + matrix.T, 1) for matrix in (before, after)]
    gain = sums[0] - sums[1]
    order = np.argsort(-np.abs(gain), axis=None, kind="stable")[:PAIRS]
    pairs = sorted((divmod(int(cell), len(classes)) for cell in order if gain.flat[cell]), key=lambda c: -int(gain[c]))
    return [
        {"classes": [classes[a], classes[b]], "before": int(sums[0][a, b]), "after": int(sums[1][a, b])}
        for a, b in pairs
    ]


def prototypes(sums: Sums, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Of SSA and CAC: each class that occurs, averaged over the images that it occurs in; empty for other classifiers.

    semantic_cosine: of the fixed and the adapted semantic prototype. consistency: length of the mean of the adapted
    prototypes' directions, 1 if they are the same in all images. spatial_inside, spatial_outside: mean cosine of the
    spatial prototype and the spatial feature in the class's mask, and in the rest of the image; CAC has none.
    """
    each = sums.prototypes
    if each.directions is None:
        return []
    lengths = np.linalg.norm(each.directions, axis=1)
    return [
        {
            "name": name,
            "images": int(each.images[k]),
            "semantic_cosine": ratio(each.cosine[k], each.images[k]),
            "consistency": ratio(lengths[k], each.images[k]),
            "spatial_inside": ratio(each.inside[k], each.with_inside[k]),
            "spatial_outside": ratio(each.outside[k], each.with_outside[k]),
        }
        for k, name in enumerate(classes)
        if each.images[k]
    ]
