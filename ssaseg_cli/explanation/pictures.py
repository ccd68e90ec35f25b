"""The picture of one image: labels of each classifier, what changed, and the activations of its classes side by side.

Axes: K classes, H×W pixels. Images are BGR uint8 (H,W,3).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from ssaseg.cli.drawing import panels
from ssaseg.cli.drawing.panels import Legend, Panel, Scale
from ssaseg.cli.explanation.probing import Prototypes, Stage
from ssaseg.cli.scoring.boundary import reach
from ssaseg.datasets import IGNORED

MOST_ROWS = 6  # classes in a picture, unless classes are chosen
OUTLINE = (0, 255, 255)  # RGB
CHANGED: Legend = (("changed", panels.STILL_WRONG),)
# The same in every panel of every picture, so that all can be compared.
PROBABILITY = Scale("activation: softmax probability of the class; cyan: edge of the mask", 0, 1, "inferno")
COSINE = Scale("cosine of spatial prototype and spatial feature; black: edge of the mask", -1, 1, "RdBu_r")


@dataclass(frozen=True)
class Artist:
    """Draws images; holds what is the same for all of them."""

    classes: Sequence[str]
    palette: Sequence[Sequence[int]]  # RGB
    captions: Mapping[str, str]  # of the classifiers, by name
    comparisons: Sequence[tuple[str, str]]
    chosen: Sequence[int]  # classes to draw; empty: those with most pixels

    def draw(
        self,
        name: str,
        image: np.ndarray,
        labels: np.ndarray | None,
        stages: Mapping[str, Stage],
        distance: np.ndarray,
        prototypes: Prototypes | None,
    ) -> bytes:
        """PNG of an image with the results of its classifiers; labels uint8 (H,W), None: not known; `distance` (H,W):
        `edge_distance` of the labels, or of the final ones.
        """
        masks = stages["final"].labels if labels is None else labels
        rows = [self._label_row(name, image, labels, stages)]
        changes = [self._changes(image, labels, stages, *pair) for pair in self.comparisons]
        # A row of their own, unless this would make no picture narrower.
        if len(rows[0]) + len(changes) <= 1 + len(stages) + (
            prototypes is not None and prototypes.similarity is not None
        ):
            rows[0] += changes
        else:
            rows.append(changes)
        pixels = np.bincount(masks.ravel(), minlength=256)[:IGNORED]
        largest = [int(index) for index in np.argsort(-pixels, kind="stable")[:MOST_ROWS] if pixels[index]]
        middle = distance > reach(masks.shape)
        shown = self.chosen or largest
        found = [] if prototypes is None else [prototypes.gaze(index) for index in shown]
        gazes = [gaze for gaze in found if gaze is not None]
        scale = cosine_scale(gazes)
        for index, gaze in zip_longest(shown, gazes):
            row = self._activation_row(index, image, masks, middle, stages)
            rows.append(row if gaze is None else [*row, gaze_panel(gaze, masks == index, scale)])
        maps = [masks, *(stage.labels for stage in stages.values())]
        legend = panels.legend_of(maps, self.classes, self.palette)
        compared = (panels.CHANGES if labels is not None else CHANGED) if self.comparisons else ()
        scales = [PROBABILITY, *([scale] if gazes else [])]
        return panels.encode(panels.grid(rows, legend, compared, *scales), ".png")

    def _label_row(
        self, name: str, image: np.ndarray, labels: np.ndarray | None, stages: Mapping[str, Stage]
    ) -> list[Panel]:
        row = [Panel(name, image)]
        for key, stage in stages.items():
            caption = self.captions[key] + ("" if labels is None else f": {right(stage.labels, labels):.1f} % right")
            row.append(Panel(caption, panels.coloured(image, stage.labels, self.palette)))
        if labels is not None:
            row.append(Panel("label", panels.coloured(image, labels, self.palette)))
        return row

    def _changes(
        self, image: np.ndarray, labels: np.ndarray | None, stages: Mapping[str, Stage], first: str, second: str
    ) -> Panel:
        """Which labels differ between two classifiers; with labels, for better or worse."""
        before, after = stages[first].labels, stages[second].labels
        heading = f"from {self.captions[first].removeprefix('against: ').partition(' (')[0]}"  # there is little space
        if labels is not None:
            return panels.changes(image, labels, before, after, heading)
        differs = before != after
        caption = f"{heading}: {differs.mean() * 100:.1f} % changed"
        return Panel(caption, panels.marked(image, differs, panels.STILL_WRONG))

    def _activation_row(
        self,
        index: int,
        image: np.ndarray,
        masks: np.ndarray,
        middle: np.ndarray,
        stages: Mapping[str, Stage],
    ) -> list[Panel]:
        """The mask of a class, and its activation by each classifier."""
        mask = masks == index
        share = f"{self.classes[index]}: {mask.mean() * 100:.1f} % of the image"
        row = [Panel(share, panels.outlined(image, mask, OUTLINE))]
        for key, stage in stages.items():
            activation = stage.probability(index)
            caption = f"{self.captions[key]}: {means(activation, mask, middle)}"
            row.append(Panel(caption, panels.outlined(panels.heat(activation, PROBABILITY), mask, OUTLINE)))
        return row


def cosine_scale(gazes: Sequence[np.ndarray]) -> Scale:
    """One scale for all cosines of a picture, with 0 in its middle; with −1 to 1, most maps would be nearly white."""
    most = max((float(np.abs(gaze).max()) for gaze in gazes), default=1.0)
    limit = min(max(np.ceil(most * 10) / 10, 0.1), 1.0)
    return COSINE._replace(low=-limit, high=limit)


def gaze_panel(gaze: np.ndarray, mask: np.ndarray, scale: Scale) -> Panel:
    """Where a class's spatial prototype looks: cosines (H,W), with the class's mask, bool (H,W)."""
    inside, outside = (f"{gaze[part].mean():+.2f}" if part.any() else "–" for part in (mask, ~mask))
    caption = f"spatial prototype: inside {inside}, outside {outside}"
    return Panel(caption, panels.outlined(panels.heat(gaze, scale), mask, (0, 0, 0)))


def right(prediction: np.ndarray, labels: np.ndarray) -> float:
    """Share of the labelled pixels that are right [%]; 0 if there are none."""
    labelled = labels != IGNORED
    return float((prediction == labels)[labelled].mean() * 100) if labelled.any() else 0.0


def means(values: np.ndarray, mask: np.ndarray, middle: np.ndarray) -> str:
    """Mean values in the rim and in the middle of a mask, as a caption."""
    rim, inner = (f"{values[part].mean():.2f}" if part.any() else "–" for part in (mask & ~middle, mask & middle))
    return f"rim {rim}, middle {inner}"
