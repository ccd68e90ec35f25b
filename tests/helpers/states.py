"""Small training states, for tests of reading and writing them."""

from pathlib import Path
from typing import Any

import torch

from ssaseg.cli.training.job import Progress
from ssaseg.cli.training.state import save_state
from ssaseg.recipes import Recipe, load_recipe

RECIPE = load_recipe("demo")
DATA = {"train": {"images": 2, "classes": ["a", "b"], "names": "0f", "content": "1e"}}


def save(folder: Path, step: int, base: Recipe = RECIPE, **changes: Any) -> None:
    """A state of one weight, whose value is the step."""
    model = torch.nn.Linear(1, 1, bias=False)
    recipe = base.model_dump(mode="json")
    recipe["train"] |= changes
    optimizer = torch.optim.AdamW([{"params": [model.weight], "names": ["weight"]}], fused=True)
    model.weight.sum().backward()
    optimizer.step()
    torch.nn.init.constant_(model.weight, step)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    save_state(folder, Progress(step=step), model, optimizer, scaler, recipe, {"data": DATA})
