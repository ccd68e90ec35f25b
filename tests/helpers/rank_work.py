"""What ranks do in tests, each in a process of its own."""

import os
import pickle
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from ssaseg.cli.errors import CommandError
from ssaseg.cli.ranks import ranks as distributed
from ssaseg.cli.ranks import rendezvous
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


def exchange(folder: Path, seconds: float) -> None:
    """Ranks that send one another values for some seconds; each writes what it got, and its listening addresses."""
    with connect(torch.device("cpu")) as ranks:
        until = time.monotonic() + seconds
        while not ranks.any(time.monotonic() > until):
            time.sleep(0.02)
            got = ranks.gather({"rank": ranks.rank, "tensor": torch.full((2,), ranks.rank)})
        sockets = psutil.Process().net_connections(kind="inet")
        addresses = sorted({each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN})
        (folder / f"{ranks.rank}.txt").write_text(f"{[each['rank'] for each in got]} {addresses}")


def show_another_secret() -> None:
    if os.environ["RANK"] == "1":
        folder = Path(os.environ[rendezvous.LAUNCHED])
        (folder / "guess").write_bytes(bytes(32))
        rendezvous.SECRET = "guess"
    with connect(torch.device("cpu")):
        pass


class Evil:
    """Runs code in the process that unpickles it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def play_rank_1(port: int, marker: Path) -> None:
    """Joins ranks that meet at a port of this machine, as a stranger can, and answers with a pickle."""
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=False, timeout=timedelta(seconds=20))
    name = rendezvous.agree_on_name(store, 1, 2, timedelta(seconds=20))
    dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=1, world_size=2)
    content = torch.frombuffer(bytearray(pickle.dumps(Evil(marker))), dtype=torch.uint8)
    length = torch.tensor([len(content)])
    dist.all_reduce(length, dist.ReduceOp.MAX)
    message = torch.zeros(8 + int(length), dtype=torch.uint8)
    message[:8], message[8 : 8 + len(content)] = torch.tensor([len(content)]).view(torch.uint8), content
    dist.all_gather([torch.empty_like(message) for _ in range(2)], message)
    os._exit(0)


def meet_at(port: int) -> None:
    """Rank 0 of two, as torchrun would start it."""
    os.environ.update(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        with connect(torch.device("cpu")):
            pass
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
