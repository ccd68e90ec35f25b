"""How the ranks that were started together find one another, and no process that was not started with them."""

import hmac
import os
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ssaseg.cli.device import LAUNCHED
from ssaseg.cli.errors import CommandError
from ssaseg.cli.ranks.launcher import SECRET, STORE


def meet(patience: timedelta) -> tuple[Any, int, int]:
    """Connects with the other ranks of this start: their common key-value store, this process's rank, their number.

    The store is a file in the folder that `LAUNCHED` names, if `--gpus` has started the ranks. Otherwise it is at
    MASTER_ADDR and MASTER_PORT, as torchrun's environment says: anyone who reaches that port can join. Raises
    `dist.DistError` if not all ranks connect within `patience`.
    """
    if LAUNCHED in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        file = dist.FileStore(str(Path(os.environ[LAUNCHED]) / STORE), size)
        file.set_timeout(patience)
        return file, rank, size
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=patience)))
    # Older versions of PyTorch put torchrun's number of restarts before each key.
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return dist.PrefixStore(agree_on_name(store, rank, size, patience), store), rank, size


def require_own(rank: int, size: int) -> None:
    """Raises CommandError if a connection of the ranks that `--gpus` has started leads to another process.

    The store is out of the reach of others, but connections themselves go through the loopback interface, where another
    user of the machine may be faster than a rank. Every rank shows that it knows the secret, before anything else that
    comes through these connections is used.
    """
    if LAUNCHED not in os.environ:
        return
    secret = (Path(os.environ[LAUNCHED]) / SECRET).read_bytes()
    proofs = [hmac.digest(secret, f"rank {each} of {size}".encode(), "sha256") for each in range(size)]
    shown = [torch.empty(len(proofs[0]), dtype=torch.uint8) for _ in range(size)]
    dist.all_gather(shown, torch.frombuffer(bytearray(proofs[rank]), dtype=torch.uint8))
    for each, (got, expected) in enumerate(zip(shown, proofs, strict=True)):
        if not hmac.compare_digest(got.numpy().tobytes(), expected):
            raise CommandError(
                f"rank {rank} of {size}: what has connected as rank {each} was not started by this command\n"
                "another user of this machine may be attacking it; nothing was sent to that process"
            )


def agree_on_name(store: Any, rank: int, size: int, patience: timedelta) -> str:
    """A name for this start, the same for all its ranks and unique to it. It is the prefix of their keys in `store`.

    torchrun's store survives a restart: without a prefix, ranks would find the addresses of the ranks before them.
    torchrun's number of restarts cannot be the prefix, since each machine counts only its own failures. So each rank
    asks with a new random name, and rank 0 answers with the name of the start. Nobody reads answers to older ranks.
    """
    own = uuid.uuid4().hex
    if rank != 0:
        store.set(f"ssaseg/call/{rank}", own)
        name = store.get(f"ssaseg/answer/{own}").decode()  # waits
        store.set(f"ssaseg/here/{name}/{rank}", "")
        return str(name)
    until, missing = time.monotonic() + patience.total_seconds(), list(range(1, size))
    while missing:
        if time.monotonic() > until:
            raise dist.DistStoreError(f"wait timeout after {patience}, ranks: {', '.join(map(str, missing))}")
        for each in missing:
            if store.check(
                [f"ssaseg/call/{each}"]
            ):  # repeated until the rank has replied: this may be the call of an earlier start
                store.set(f"ssaseg/answer/{store.get(f'ssaseg/call/{each}').decode()}", own)
        time.sleep(0.02)
        missing = [each for each in missing if not store.check([f"ssaseg/here/{own}/{each}"])]
    return own
