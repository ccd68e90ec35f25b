"""What ranks do in tests, each in a process of its own."""

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssaseg.cli.ranks import ranks as distributed
from ssaseg.cli.ranks.ranks import Ranks, connect, was_restarted
from ssaseg.cli.training.build import build_job
from ssaseg.cli.training.step import train_step
from ssaseg.recipes import load_recipe


def meet_twice() -> None:
    """As after a restart. Machines count their own failures: here rank 0 has had one more."""
    rank = int(os.environ["RANK"])
    for failures in (0, 1):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(failures + 1 - rank)
        with connect(torch.device("cpu")) as ranks:
            assert ranks.gather(rank) == [0, 1]
            assert ranks.any(was_restarted())


def wait_in_vain(patience: float, late: float) -> None:
    distributed.PATIENCE = timedelta(seconds=patience)
    with connect(torch.device("cpu")) as ranks:
        time.sleep(late if ranks.main else 0)
        ranks.barrier()


def gradients(ranks: Ranks, overrides: list[str]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Of one step: the losses, averaged over ranks, and the gradients that the optimiser was given."""
    job = build_job(load_recipe("demo", overrides), Path("nowhere"), ranks)
    kept: dict[str, Tensor] = {}

    def spy(*_: Any, **__: Any) -> None:
        kept.update({name: each.grad.clone() for name, each in job.model.named_parameters() if each.grad is not None})

    job.optimizer.step = spy  # type: ignore[method-assign]
    record, names = train_step(job, [next(job.batches) for _ in range(job.micro_batches)])
    losses = (ranks.total(record.losses) / ranks.size).tolist()
    return dict(zip(names, losses, strict=True)), kept


def write_gradients(folder: Path, device: str, kinds: list[list[str]]) -> None:
    with connect(torch.device(device)) as ranks:
        found = [gradients(ranks, overrides) for overrides in kinds]
        torch.save(found, folder / f"{ranks.rank}.pt")
