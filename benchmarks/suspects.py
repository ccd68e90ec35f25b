"""Does `ssaseg data suspects` find wrong labels? Labels are made wrong on purpose, and their ranks are counted.

    python benchmarks/suspects.py --root data/camvid     # writes benchmarks/results/suspects.json
    python benchmarks/suspects.py --smoke                # built-in scenes, random weights; writes nothing

In each of --rounds rounds 5 % of CamVid's validation labels are wrong, in three ways that take turns: two classes are
swapped in a region, the whole mask is shifted, or the objects of one class are missing (their pixels get the nearest
other class). Images and ways follow from the round's number. The network is the one in benchmarks/weights, which was
not trained on these images. Counted: the share of the wrong images in the first 20 % of the ranking, for the score of
`data suspects` and, on the same probabilities, for cleanlab's `softmin` score if cleanlab is installed.
"""

import argparse
import json
import platform
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from ssaseg.cli.curation.contradictions import Suspicion, contradictions, share_found
from ssaseg.cli.curation.suspects import look
from ssaseg.cli.engine.opening import make_engine, open_file
from ssaseg.cli.evaluation.report import open_dataset
from ssaseg.cli.scoring.engines import TorchEngine
from ssaseg.cli.scoring.inference import Inference
from ssaseg.datasets import IGNORED
from ssaseg.models import build_model
from ssaseg.recipes import load_recipe, parse_protocol

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "suspects.json"
WEIGHTS = HERE / "weights" / "camvid-seaformer_s-ssa.safetensors"
WRONG, FIRST = 0.05, 0.2  # shares of the images
WAYS = ("swapped", "shifted", "missing")


# ---- wrong labels ------------------------------------------------------------------------------------------------


def swapped(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The two most common classes of a rectangle, of a quarter to 40 % of each side, change places in it."""
    height, width = labels.shape
    rows, columns = (round(side * generator.uniform(0.25, 0.4)) for side in (height, width))
    top, left = generator.integers(0, height - rows), generator.integers(0, width - columns)
    changed = labels.copy()
    region = changed[top : top + rows, left : left + columns]
    first, second = np.argsort(-np.bincount(region.ravel(), minlength=256)[:IGNORED], kind="stable")[:2]
    before = region.copy()
    region[before == first] = second
    region[before == second] = first
    return changed


def shifted(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The mask moves by 5 to 8 % of the width and 3 to 6 % of the height; what leaves it comes in at the other side."""
    height, width = labels.shape
    signs = generator.choice([-1, 1], 2)
    down, right = round(height * generator.uniform(0.03, 0.06)), round(width * generator.uniform(0.05, 0.08))
    return np.roll(labels, (signs[0] * down, signs[1] * right), (0, 1))


def missing(labels: np.ndarray, objects: list[int]) -> np.ndarray:
    """The most common class of `objects` is gone: its pixels have the label of the nearest pixel of another class."""
    counts = np.bincount(labels.ravel(), minlength=256)
    gone = labels == max(objects, key=lambda k: counts[k])
    unknown = gone | (labels == IGNORED)
    _, nearest = cv2.distanceTransformWithLabels(
        unknown.astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    table = np.zeros(nearest.max() + 1, np.uint8)
    table[nearest[~unknown]] = labels[~unknown]
    return np.where(gone, table[nearest], labels)


def made_wrong(labels: np.ndarray, way: str, generator: np.random.Generator, objects: list[int]) -> np.ndarray:
    """Wrong labels uint8 (H,W) in one of `WAYS`."""
    if way == "missing":
        return missing(labels, objects)
    return (swapped if way == "swapped" else shifted)(labels, generator)


# ---- rankings ----------------------------------------------------------------------------------------------------


def cleanlab_order(probabilities: list[np.ndarray], labels: list[np.ndarray]) -> list[int] | None:
    """Images by cleanlab's `softmin`, the most suspicious first; None if cleanlab is not installed. Ignored pixels are
    right with certainty, as cleanlab has no ignored pixels.
    """
    try:
        from cleanlab.segmentation.rank import get_label_quality_scores
    except ImportError:
        return None
    scores = []
    for rows, truth in zip(probabilities, labels, strict=True):
        known = truth != IGNORED
        rows = np.where(known, rows.astype(np.float32), np.arange(len(rows))[:, None, None] == 0)
        scores.append(get_label_quality_scores(np.where(known, truth, 0)[None], rows[None], verbose=False)[0][0])
    return np.argsort(scores, kind="stable").tolist()


def one_round(number: int, probabilities: list[np.ndarray], labels: list[np.ndarray], objects: list[int]) -> Any:
    """Ranks of the wrong images: side → list of (way, rank from 0)."""
    generator, images = np.random.default_rng(number), len(labels)
    wrong = generator.choice(images, max(round(WRONG * images), 1), replace=False).tolist()
    ways = {image: WAYS[(number + place) % len(WAYS)] for place, image in enumerate(wrong)}
    truth = [
        made_wrong(each, ways[index], generator, objects) if index in ways else each
        for index, each in enumerate(labels)
    ]
    suspicion = Suspicion(len(probabilities[0]))
    for rows, each in zip(probabilities, truth, strict=True):
        suspicion.add(contradictions(rows, each))
    ranking = suspicion.rank()
    orders = {"ours": [suspect.image for suspect in ranking]}
    if (order := cleanlab_order(probabilities, truth)) is not None:
        orders["cleanlab softmin"] = order
    places = {side: {image: place for place, image in enumerate(order)} for side, order in orders.items()}
    found = {side: [(ways[each], ranks.get(each, images)) for each in wrong] for side, ranks in places.items()}
    assert share_found(ranking, wrong, images, FIRST) == np.mean([r < round(FIRST * images) for _, r in found["ours"]])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="CamVid's folder")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        recipe = load_recipe("demo", ["data.synthetic.val=5", "data.synthetic.height=64", "data.synthetic.width=64"])
        torch.manual_seed(0)
        classes = len(open_dataset(recipe, "val", None).classes)
        engine: Any = TorchEngine.of(build_model("seaformer_t", classes), torch.device("cpu"))
        inference = Inference(engine, parse_protocol({}, "protocol"), recipe.data.mean, recipe.data.std)
    else:
        recipe, opened = load_recipe("camvid-seaformer_s-ssa"), open_file(WEIGHTS)
        protocol = parse_protocol(opened.metadata["protocol"], "protocol")
        engine = make_engine(opened, torch.device("cpu"))
        inference = Inference(engine, protocol, opened.metadata["mean"], opened.metadata["std"])
    dataset = open_dataset(recipe, "val", options.root)
    names = ("pole", "sign_symbol", "car", "pedestrian", "bicyclist")
    objects = [dataset.classes.index(name) for name in names if name in dataset.classes] or [1]
    probabilities, labels = [], []
    for index in range(len(dataset)):
        image, truth = dataset.load(index)
        rows = look(inference, image, dataset.name(index)).probabilities
        assert rows is not None
        probabilities.append(rows[:, ::2, ::2])  # a quarter of the pixels: all rounds are counted from memory
        labels.append(truth[::2, ::2])
    ranks: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for number in range(2 if options.smoke else options.rounds):
        for side, found in one_round(number, probabilities, labels, objects).items():
            ranks[side] += found
    first = round(FIRST * len(labels))
    sides = {}
    for side, found in ranks.items():
        by_way = {way: [rank for name, rank in found if name == way] for way in WAYS}
        sides[side] = {
            "wrong images": len(found),
            "share in the first 20 %": float(np.mean([rank < first for _, rank in found])),
            "by way": {way: float(np.mean([rank < first for rank in each])) for way, each in by_way.items() if each},
            "median rank": float(np.median([rank for _, rank in found])),
        }
        print(f"{side}: {json.dumps(sides[side])}")
    if options.smoke:
        return
    report = {
        "command": f"python benchmarks/suspects.py --root CAMVID --rounds {options.rounds}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "on": "CPU, float32",
        "images": len(labels),
        "wrong in each round": max(round(WRONG * len(labels)), 1),
        "goal": "at least 80 % in the first 20 %",
        "sides": sides,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
