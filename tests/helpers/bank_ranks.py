"""One of two ranks that train the demo with classifiers that have state: python -m bank_ranks FOLDER."""

import sys
from pathlib import Path

import bank
import torch

from ssaseg.cli.ranks.ranks import connect
from ssaseg.cli.training.build import build_job
from ssaseg.cli.training.step import train_step
from ssaseg.recipes import load_recipe

WORDS = [
    "data.synthetic.height=64", "data.synthetic.width=64", "data.synthetic.train=16",
    "data.synthetic.val=2", "augment.scale=[64,64]", "augment.crop=[64,64]", "train.batch=8", "train.workers=0",
    "train.micro_batch=2", "model.dropout=0", "model.drop_path=0", "optim.freeze=[norm]", "distill.group=2",
]  # fmt: skip
KINDS = {
    "bank": "{}",
    "protoseg": "{prototypes: 3, assignment: argmax}",
    "gmmseg": "{components: 2, width: 8, memory: 30, samples: 5, interval: 1}",
    "dnc": "{prototypes: 3, memory: 60, samples: 10}",
}
STEPS = 2


def train(folder: Path, ranks: object, kind: str) -> dict[str, torch.Tensor]:
    """The model's state after some steps, and the classifier's own after the first, as "first.NAME"."""
    words = [*WORDS, f"model.classifier={kind}", f"model.options={KINDS[kind]}"]
    job = build_job(load_recipe("demo", words), folder / kind, ranks)  # type: ignore[arg-type]
    first: dict[str, torch.Tensor] = {}
    for _ in range(STEPS):
        train_step(job, [next(job.batches) for _ in range(job.micro_batches)])
        job.progress.step += 1
        own = job.model.classifier.named_buffers()
        first = first or {f"first.{name}": value.clone() for name, value in own if "projection" not in name}
    return {key: value.clone() for key, value in job.model.state_dict().items()} | first


if __name__ == "__main__":
    torch.set_num_threads(1)
    bank.register()
    with connect(torch.device("cpu")) as found:
        states = {kind: train(Path(sys.argv[1]), found, kind) for kind in KINDS}
        torch.save(states, Path(sys.argv[1]) / f"{found.rank}.pt")
