"""How ranks that were started together find one another, and none of an earlier start."""

import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist


def meet(patience: timedelta) -> tuple[Any, int, int]:
    """The key-value store that the ranks of this start share, this one's rank, and their number.

    From torchrun's environment (RANK, WORLD_SIZE, MASTER_*). Raises `dist.DistError` where they do not meet in
    `patience`.
    """
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=patience)))
    while isinstance(store, dist.PrefixStore):  # earlier PyTorches put torchrun's number of restarts before a key
        store = store.underlying_store
    return dist.PrefixStore(agree_on_name(store, rank, size, patience), store), rank, size


def agree_on_name(store: Any, rank: int, size: int, patience: timedelta) -> str:
    """A name that all ranks of this start have in common, and no other start, for what they keep in `store`.

    torchrun's store outlives a restart: under the same names ranks would find the addresses of those before them. Its
    number of restarts is no such name, as each machine counts its own failures. So a rank calls itself what none was
    called before, and takes what rank 0 answers to that; answers to ranks of earlier starts are nobody's.
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
            if store.check([f"ssaseg/call/{each}"]):  # again until it is here: it may be the call of an earlier start
                store.set(f"ssaseg/answer/{store.get(f'ssaseg/call/{each}').decode()}", own)
        time.sleep(0.02)
        missing = [each for each in missing if not store.check([f"ssaseg/here/{own}/{each}"])]
    return own
