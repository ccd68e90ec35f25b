"""Does `ssaseg data pick` choose better images than chance? Trained on both halves of CamVid's training images.

    python benchmarks/pick.py --root data/camvid --work runs/pick     # writes benchmarks/results/pick.json
    python benchmarks/pick.py --smoke                                 # drawn scenes, 2 steps; writes nothing

For each seed: a network is trained on `START` random images (the start set). It picks images from the rest until half
of all are chosen: `ssaseg data pick --labelled`. Two networks are then trained on these images, and on the same start
set with as many random images. All three trainings have the same recipe, seed and number of steps, and start from
ImageNet weights: no network that chooses has seen the labels of the images that it chooses from. Scores are those of
`ssaseg compare` on all validation images, in blocks of neighbouring frames, as these resemble each other.

What is complete in --work is used as it is, and a training that was stopped continues.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssaseg.cli.main import cli
from ssaseg.datasets.exporting import export_scenes
from ssaseg.datasets.synthetic import CLASSES

RESULTS = Path(__file__).parent / "results" / "pick.json"
RECIPE = "camvid-lite0-ssa"
START, HALF = 1 / 6, 1 / 2  # shares of the training images
BLOCK = 5  # neighbouring frames that are one block of the interval
TRAINING = ["model.classifier=linear", "train.steps=200", "optim.warmup=40"]
SMALL = [
    *("model.classifier=linear", "model.pretrained=null", "train.steps=2", "optim.warmup=0", "train.batch=4"),
    *("augment.crop=[64, 64]", "augment.scale=[64, 64]", "train.workers=0", f"data.classes=[{', '.join(CLASSES)}]"),
    "data.palette=null",
]


def ssaseg(*words: str | Path) -> None:
    """A command of the program, in this process. Raises SystemExit where it is not done."""
    try:
        cli.main([str(word) for word in words], "ssaseg")
    except SystemExit as end:
        if end.code:
            raise SystemExit(f"ssaseg {' '.join(map(str, words))[:200]}: exit code {end.code}") from None


def write_names(file: Path, names: list[str]) -> Path:
    """A list of names, as `data.train.names` takes it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{name}\n" for name in names))
    return file


def trained(folder: Path, names: list[str], words: list[str], seed: int) -> Path:
    """The checkpoint of a training on these images in `folder`; one that is complete is returned as it is."""
    run, asked = folder / "run", folder / "asked.json"
    text = json.dumps([names, words, seed])
    if asked.exists() and asked.read_text() != text:
        raise SystemExit(f"{folder}: a training with other settings\nchoose another --work, or delete it")
    checkpoint = run / "last.safetensors"
    if not (folder / "done").exists():
        listed = write_names(folder / "names.txt", names).resolve()
        asked.write_text(text)
        resume = ["--resume"] if any(run.glob("state-*.pt")) else []
        ssaseg("train", RECIPE, *words, f"data.train.names={listed}", f"train.seed={seed}", "--out", run, *resume)
        (folder / "done").touch()
    return checkpoint


def one_seed(seed: int, root: Path, work: Path, words: list[str], block: int) -> dict[str, Any]:
    """Scores [%] of the three networks of a seed, and the difference of picked and random images."""
    images = {file.stem: file for file in sorted((root / "images" / "train").iterdir())}
    order = [list(images)[index] for index in np.random.default_rng(seed).permutation(len(images))]
    first, half = round(START * len(order)), round(HALF * len(order))
    start, rest, folder = order[:first], order[first:], work / f"seed-{seed}"
    # The evaluation at the end of a training looks at one image: all are scored below.
    val = write_names(folder / "val.txt", [min(file.stem for file in (root / "images" / "val").iterdir())]).resolve()
    words = [*words, f"data.root={root.resolve()}", f"data.val.names={val}"]
    network = trained(folder / "start", start, words, seed)
    listed = folder / "picked.txt"
    if not listed.exists():
        known = folder / "start" / "run" / "config.yaml"
        pool = [images[name] for name in sorted(rest)]
        ssaseg("data", "pick", network, *pool, "--count", half - first, "--labelled", known, "--out", listed)
    picked = [Path(line).stem for line in listed.read_text().splitlines()]
    assert len(set(picked)) == half - first
    assert not set(picked) & set(start)
    sides = {"random": rest[: half - first], "picked": picked}
    networks = {name: trained(folder / name, [*start, *more], words, seed) for name, more in sides.items()}
    data = write_recipe(folder / "data.yaml", words)
    report = folder / "compare.json"
    for other, file in (("start", folder / "start.json"), ("picked", report)):
        if not file.exists():
            pair = [folder / other / "run" / "last.safetensors", networks["random"]]
            pair = pair[::-1] if other == "picked" else pair  # the difference is that of the second from the first
            ssaseg("compare", *pair, "--data", data, "--blocks", block, "--json", file)
    found = json.loads(report.read_text())["test"]["mIoU"]
    return {
        "seed": seed,
        "images": {
            "start": len(start),
            "halves": half,
            "in both halves": half - len(set(picked) - set(sides["random"])),
        },
        "mIoU": {
            "start": json.loads((folder / "start.json").read_text())["test"]["mIoU"]["a"],
            "random": found["a"],
            "picked": found["b"],
        },
        "picked minus random": {key: found[key] for key in ("difference", "interval", "p")},
    }


def write_recipe(file: Path, words: list[str]) -> Path:
    """The recipe by which all networks are scored: that of the training, with all validation images."""
    keys = [word for word in words if word.startswith("data.") and not word.startswith("data.val.names")]
    lines = [f"  {key.removeprefix('data.')}: {value}" for key, _, value in (word.partition("=") for word in keys)]
    file.write_text("\n".join([f"extends: {RECIPE}", "data:", *lines]) + "\n")
    return file


def main() -> None:
    """Trains what is missing, prints the scores of each seed and their means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="CamVid's folder")
    parser.add_argument("--work", type=Path, default=Path("runs/pick"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds, from 0")
    parser.add_argument("--smoke", action="store_true", help="small and quick; writes nothing")
    options = parser.parse_args()
    if options.root is None and not options.smoke:
        parser.error("give --root, CamVid's folder")
    with tempfile.TemporaryDirectory() as temporary:
        words, seeds, block = TRAINING, options.seeds, BLOCK
        if options.smoke:
            options.root, options.work = Path(temporary, "scenes"), Path(temporary, "work")
            for split, count in (("train", 12), ("val", 4)):
                export_scenes(options.root, count, split=split, height=64, width=64)
            words, seeds, block = SMALL, 1, 2
        rows = [one_seed(seed, options.root, options.work, words, block) for seed in range(seeds)]
    for row in rows:
        print(json.dumps(row))
    differences = [row["picked minus random"]["difference"] for row in rows]
    means = {side: float(np.mean([row["mIoU"][side] for row in rows])) for side in rows[0]["mIoU"]}
    spread = float(np.std(differences, ddof=1)) if len(rows) > 1 else None
    print(f"mean mIoU {json.dumps(means)}; picked minus random {np.mean(differences):+.2f} points, deviation {spread}")
    if options.smoke:
        return
    report = {
        "command": f"python benchmarks/pick.py --root CAMVID --work WORK --seeds {seeds}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "on": f"CPU, float32, {torch.get_num_threads()} threads",
        "recipe": [RECIPE, *words],
        "frames in a block of the interval": block,
        "seeds": rows,
        "mean mIoU": means,
        "picked minus random": {"mean": float(np.mean(differences)), "standard deviation over seeds": spread},
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
