"""One of two ranks that train the demo with `bank`: python -m bank_ranks FOLDER."""

import sys
from pathlib import Path

import bank
import torch

from ssaseg.cli.ranks.ranks import connect
from ssaseg.cli.training.build import build_job
from ssaseg.cli.training.step import train_step
from ssaseg.recipes import load_recipe

WORDS = [
    "model.classifier=bank", "data.synthetic.height=64", "data.synthetic.width=64", "data.synthetic.train=16",
    "data.synthetic.val=2", "augment.scale=[64,64]", "augment.crop=[64,64]", "train.batch=8", "train.workers=0",
    "train.micro_batch=2", "model.dropout=0", "model.drop_path=0", "optim.freeze=[norm]",
]  # fmt: skip
STEPS = 3


def train(folder: Path, ranks: object) -> dict[str, torch.Tensor]:
    """The model's state after some steps, and its prototypes after the first."""
    job = build_job(load_recipe("demo", WORDS), folder, ranks)  # type: ignore[arg-type]
    first = {}
    for _ in range(STEPS):
        train_step(job, [next(job.batches) for _ in range(job.micro_batches)])
        job.progress.step += 1
        first = first or {"first": job.model.classifier.prototypes.clone()}
    return {key: value.clone() for key, value in job.model.state_dict().items()} | first


if __name__ == "__main__":
    torch.set_num_threads(1)
    bank.register()
    with connect(torch.device("cpu")) as found:
        state = train(Path(sys.argv[1]), found)
        torch.save(state, Path(sys.argv[1]) / f"{found.rank}.pt")
