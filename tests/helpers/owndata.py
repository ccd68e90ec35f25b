"""A user's folder goes the whole way: what `init` says, the command that it prints, and the ids that training reads."""

import re
import shlex
from pathlib import Path

import numpy as np
from calling import call
from PIL import Image

from ssaseg.datasets import build_dataset
from ssaseg.recipes import load_recipe
from ssaseg.recipes.data import Data

rng = np.random.default_rng(8)
HEIGHT, WIDTH = 24, 32


def truth(classes: int, seed: int) -> np.ndarray:
    """Ids uint8 (H, W): a rectangle of each class above the background, the later ones smaller."""
    random = np.random.default_rng(seed)
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    for value in range(1, classes):
        top, left = random.integers(0, 8, 2)
        size = 12 - 2 * value
        ids[top : top + size, left + 2 * value : left + 2 * value + size] = value
    return ids


def save(file: Path, pixels: np.ndarray, mode: str | None = None, **how: object) -> None:
    """Pixels as a picture file, in a mode of Pillow."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(file, **how)


def photo(file: Path) -> None:
    save(file, rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))


def read_all(recipe: Path) -> tuple[Data, dict[str, np.ndarray]]:
    """The data section of a recipe, and the train ids of all images by name."""
    data = load_recipe(str(recipe)).data
    labels = {}
    for split in ("train", "val"):
        pairs = build_dataset(data.dataset, split, root=Path(data.root), options=data.model_dump())
        labels |= {Path(pairs.name(index)).name: pairs.load(index)[1] for index in range(len(pairs))}
    return data, labels


def command_for(source: Path, folder: Path) -> list[str]:
    """The arguments of the command that `data init` prints for a folder that training cannot read."""
    result = call("data", "init", source, "--out", folder / "refused.yaml")
    assert result.exit_code == 2, result.output
    error = result.stderr[result.stderr.index("error: ") :]
    assert len(error.strip().splitlines()) == 3, error
    assert not (folder / "refused.yaml").exists()
    found = re.search(r"`ssaseg (data prepare .+?)`", error)
    assert found, error
    return shlex.split(found[1])


def require_checked(recipe: Path) -> None:
    """`data check` finds no error. Warnings are usual, as of classes without a pixel in one split."""
    result = call("data", "check", recipe)
    assert result.exit_code in (0, 1), result.output
    assert "error," not in result.output


def prepared(source: Path, folder: Path, *more: str) -> tuple[Data, dict[str, np.ndarray], str]:
    """Runs the command that `init` prints, with `--root FOLDER/out`, checks the recipe FOLDER/prepared.yaml that `init`
    then writes, and reads the data by it: the data section, the train ids by name, and what `prepare` has printed.
    """
    words = command_for(source, folder)
    words[words.index("--root") + 1] = str(folder / "out")
    result = call(*words, *more, "--workers", "0")
    assert result.exit_code == 0, result.output
    assert "images/s" in result.stdout
    recipe = folder / "prepared.yaml"
    assert (wrote := call("data", "init", folder / "out", "--out", recipe)).exit_code == 0, wrote.output
    require_checked(recipe)
    return *read_all(recipe), result.stdout
