"""How the ranks that were started together find one another, and do not find ranks of an earlier start."""

import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist


def meet(patience: timedelta) -> tuple[Any, int, int]:
    """Connects with the other ranks of this start: their common key-value store, this process's rank, their number.

    Reads torchrun's environment (RANK, WORLD_SIZE, MASTER_*). Raises `dist.DistError` if not all ranks connect within
    `patience`.
    """
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=patience)))
    while isinstance(
        store, dist.PrefixStore
    ):  # older versions of PyTorch put torchrun's number of restarts before each key
        store = store.underlying_store
    return dist.PrefixStore(agree_on_name(store, rank, size, patience), store), rank, size


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
