"""Ranks: processes that train or evaluate one model together, started by `--gpus N` or by torchrun.

Each computes its share and all end up with the same weights. Rank 0 alone reads states, writes files and prints; what
the others need of it they are sent, so that they need not see its disk. Words between hosts (wishes, scores, errors) go
by gloo and read nothing from a GPU; gradients and BatchNorm's statistics go by NCCL between GPUs, by gloo between CPUs.
"""

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import active_children
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssaseg.cli.device import LAUNCHED
from ssaseg.cli.errors import CommandError, muted, print_error
from ssaseg.cli.ranks.rendezvous import meet
from ssaseg.cli.signals import StopSignal
from ssaseg.models.layers import norm_statistics

# How long a rank waits for another, such as for rank 0 while it checks every label of a large data set. That a rank is
# gone is noticed sooner by those that wait for it in gloo, as its connections close. One that waits inside CUDA, as in
# each SyncBatchNorm, notices it only where NCCL does, at the latest after this time: `--gpus` and torchrun soon end the
# ranks of their own machine, but with several machines and --max-restarts 0 those of the others may wait that long.
PATIENCE = timedelta(minutes=30)

# What gloo, NCCL and the store say when the process at the other end is not there any more: not all that NCCL says.
LOST = (
    "closed by peer", "reset by peer", "closed by remote peer", "Remote peer closed", "Broken pipe",
    "Connection refused", "Connection was likely closed", "remote process exit", "communicator was aborted",
)  # fmt: skip

LATE = ("Timed out", "timed out", "wait timeout")  # and when it has not answered for PATIENCE

NOTICE = 2.0  # seconds that the parent of a rank may need to notice its end

SETTLE = 0.2  # seconds

met = False  # whether this process has been one of several ranks

SHARE = "SSASEG_SHARE_GPU"  # =1: ranks may share a GPU, over gloo; for tests


class PeerFailed(Exception):
    """Ends a rank because another has failed, which tells why."""


@dataclass
class Ranks:
    """This process's place among `size` ranks, and what they do together; alone (size 1), every method is free.

    Every method is called by all ranks, in the same order. A context: an error inside one rank ends all of them soon,
    and is told once.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    store: Any = None  # shared key-value store
    peers: Sequence[tuple[str, int]] = ()  # host and process number of each rank
    parent: int = field(default_factory=os.getppid)

    @property
    def main(self) -> bool:
        """Whether this rank is the one that prints and writes."""
        return self.rank == 0

    # ---- words between hosts -------------------------------------------------------------------------------------

    def most(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return self.most(int(flag)) > 0

    def agree(self, stop: StopSignal) -> bool:
        """Whether any rank has been asked to stop; then all have the wish, with the same exit code.

        A rank whose launcher is gone has it, too: nobody would end it any more.
        """
        number = stop.number or 0
        if self.size > 1 and os.getppid() != self.parent:
            number = signal.SIGTERM
        agreed = self.most(number)
        if agreed:  # never back to None: a signal may have come meanwhile
            stop.number = agreed
        return agreed > 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, which can be pickled, on all ranks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in the order of ranks, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits until every rank has come here."""
        self.most(0)

    # ---- tensors on the device -----------------------------------------------------------------------------------

    def total(self, tensor: Tensor) -> Tensor:
        """Sum of the ranks' tensors, on the device; no GPU waits."""
        if self.size == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    def same_statistics(self, model: nn.Module) -> None:
        """Rank 0's statistics of norms to all: without SyncBatchNorm each rank has its own. Other buffers are a
        classifier's, which every rank has computed from the same numbers.
        """
        self.same_buffers(list(norm_statistics(model).values()))

    def same_buffers(self, every: Sequence[Tensor]) -> None:
        """Rank 0's values of these buffers to all."""
        if self.size == 1:
            return
        with torch.no_grad():
            for kind in dict.fromkeys(buffer.dtype for buffer in every):  # a set's order differs
                buffers = [buffer for buffer in every if buffer.dtype == kind]
                together = torch.cat([buffer.flatten() for buffer in buffers])
                dist.broadcast(together, src=0)
                for buffer, values in zip(buffers, together.split([b.numel() for b in buffers]), strict=True):
                    buffer.copy_(values.view_as(buffer))

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` with gradients averaged over ranks, begun with rank 0's weights; on GPUs BatchNorm sees all ranks.

        PyTorch's SyncBatchNorm reads back which ranks had images: in a training step the host waits for its GPU, and
        with it for the other ranks, at each norm. The steps of several GPUs are not queued ahead as those of one are.

        Parameters that a step does not touch are looked for in each step and keep their value. Alone: the model itself.
        """
        if self.size == 1:
            return model
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.same_buffers(list(model.buffers()))
        gpus = [self.device] if on_gpu else None
        # Said of weights such as (96,1,3,3), whose strides have two spellings.
        warnings.filterwarnings("ignore", "Grad strides do not match", UserWarning)
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified", UserWarning)
        with warnings.catch_warnings():
            # Buffers are not sent before each step, as training reads none. PyTorch 2.13 renames that option, which
            # earlier ones know by this name alone.
            warnings.filterwarnings("ignore", category=FutureWarning)
            return DistributedDataParallel(model, device_ids=gpus, broadcast_buffers=False, find_unused_parameters=True)

    # ---- ending --------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.size == 1:
            return
        if error is None:
            try:
                self.barrier()  # rank 0 may keep the store that others still read
                dist.destroy_process_group()
                # Threads of gloo may still hold the last tensors. One that lets go of them only while Python ends would
                # abort the process; a model in a cycle of references keeps the threads alive that long.
                time.sleep(SETTLE)
                return
            except RuntimeError as late:
                error = late
        self._end(error)

    def _end(self, error: BaseException) -> NoReturn:
        """Ends this process with the error's exit code; of all ranks that fail one tells why.

        At once, without Python's own way out: a GPU would wait there for ranks that are gone.
        """
        for each in (signal.SIGINT, signal.SIGTERM):  # torchrun sends one at once, and there is still something to tell
            signal.signal(each, signal.SIG_IGN)
        code = None
        if isinstance(error, PeerFailed):
            code = self._first_code(seconds=10.0) or 1  # that rank may still end its workers before it tells
        elif is_loss(error) or is_late(error):
            code = self._first_code(seconds=0.5)
            lost = None if code else self.describe_lost(error)
            if lost and LAUNCHED in os.environ and not is_late(error):
                code = 1  # the launcher knows which rank ended first, and how
            elif lost:
                error = CommandError(lost)
        if code is None:
            code = self._tell(error)
        leave(code)

    def _tell(self, error: BaseException) -> int:
        """Prints the error unless another rank has told one already. Returns its exit code."""
        try:
            first = self.store.add("failures", 1) == 1
        except RuntimeError:
            # The store is gone with rank 0: it has told why, or the launcher does.
            first = LAUNCHED not in os.environ
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
        elif isinstance(error, KeyboardInterrupt):
            code = 130
        else:
            with muted(not first):
                code = print_any_error(error)
        if first:
            with contextlib.suppress(RuntimeError):
                self.store.set("code", str(code))
        return code

    def _first_code(self, seconds: float) -> int | None:
        """The exit code of a rank that failed and told why; None where none does so in `seconds`."""
        until = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):  # the store may be gone as well
            while time.monotonic() < until:
                if self.store.check(["code"]):
                    return int(self.store.get("code"))
                time.sleep(0.05)
        return None

    def describe_lost(self, error: BaseException) -> str | None:
        """Which ranks are gone, or late; None where all are there. Processes of other machines cannot be looked at."""
        others = [(rank, *place) for rank, place in enumerate(self.peers) if rank != self.rank]
        here = [(rank, pid) for rank, host, pid in others if host == socket.gethostname()]
        until = time.monotonic() + NOTICE
        while all(is_alive(pid) for _, pid in here) and time.monotonic() < until:
            time.sleep(0.05)
        gone = [str(rank) for rank, pid in here if not is_alive(pid)]
        all_here = len(here) == len(others)
        if not gone and is_late(error):
            return (
                f"rank {self.rank} of {self.size} has waited {PATIENCE.total_seconds() / 60:g} minutes for another, "
                f"{'which is alive' if all_here else 'perhaps on a machine that was lost'} ({first_line(error)})\n"
                "rank 0 alone looks at the labels, and --check all may take longer than that\n"
                "use `ssaseg data check` beforehand, in a process of its own, and leave out --check all"
            )
        if not gone and all_here:
            return None
        who = f"rank {', '.join(gone)} of {self.size}" if gone else "a rank on another machine"
        return (
            f"{who} is gone: killed from outside, or its machine was lost\n"
            f"this rank was told: {first_line(error)}\n"
            "go on from the last state with --resume; torchrun's --max-restarts does so by itself"
        )


def leave(code: int) -> NoReturn:
    """Ends this process without Python's own way out, on which gloo's threads may abort it and NCCL's may hang."""
    for child in active_children():  # they would look for this process only every five seconds
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def connect(device: torch.device) -> Ranks:
    """Meets the other ranks of torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*); without it, alone.

    `device`: of the wished type; `Ranks.device` is this rank's own. Raises CommandError for fewer GPUs than ranks, and
    where the ranks do not meet.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return Ranks(device)
    backend = "gloo"
    if device.type == "cuda":
        device, shared = own_gpu(
            int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
        )
        torch.cuda.set_device(device)
        backend = "gloo" if shared else "cpu:gloo,cuda:nccl"
    try:
        store, rank, size = meet(PATIENCE)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        ranks = Ranks(device, rank, size, dist.PrefixStore("ssaseg", store))
        ranks.peers = ranks.gather((socket.gethostname(), os.getpid()))
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or is_loss(error) or is_late(error)):
            raise
        raise CommandError(
            f"rank {os.environ['RANK']} of {size} did not meet the others: {first_line(error)}\n"
            "one of them ended before, or is not reached over the network under MASTER_ADDR and MASTER_PORT",
            exit_code=1,
        ) from None
    global met
    met = True
    return ranks


def own_gpu(local_rank: int, here: int) -> tuple[torch.device, bool]:
    """The GPU of one of `here` ranks on this machine, and whether it shares it. Raises CommandError for too few."""
    count = torch.cuda.device_count()
    if here <= count:
        return torch.device("cuda", local_rank), False
    if os.environ.get(SHARE) == "1":
        return torch.device("cuda", local_rank % count), True
    raise CommandError(
        f"{here} processes on this machine, and {count} GPU{'s' if count > 1 else ''}\n"
        f"expected one GPU each: --gpus {count}, or torchrun --nproc-per-node {count}"
    )


def was_restarted() -> bool:
    """Whether torchrun has started this rank again after a failure: the run then goes on by itself, without --resume.

    To be asked on all ranks (`Ranks.any`): each machine counts its own failures, and one that came in for another none.
    Where machines join a run without a failure (`--nnodes 1:4` that grows), nobody counts one: that is not supported,
    and ends with the error that the run folder is not empty.
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def under_torchrun() -> bool:
    """Whether torchrun has started this process: it begins a run anew that ends with another exit code than 0."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def images_per_rank(batch: int, group: int, ranks: int) -> int:
    """A rank's share of the step's `batch` images, in whole groups of `group` (1: none) where there are several ranks.

    Raises CommandError, listing the numbers of ranks that fit, where that is not possible.
    """
    fits = [count for count in range(1, batch + 1) if count == 1 or batch % (count * group) == 0]
    if ranks in fits:
        return batch // ranks
    whole = f" in whole groups of {group} (distill.group)" if group > 1 else ""
    shown = ", ".join(map(str, fits))
    raise CommandError(
        f"train.batch: {batch} images cannot be shared by {ranks} ranks{whole}\n"
        f"expected one of these numbers of ranks: {shown}; or another train.batch"
    )


def averaging(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Around a micro-batch's forward and backward pass: gradients are averaged over ranks only with the `last`."""
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def is_loss(error: BaseException) -> bool:
    """Whether an error says that another rank is not there any more."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)


def is_late(error: BaseException) -> bool:
    """Whether an error says that another rank has not come in time."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LATE)


def first_line(error: BaseException) -> str:
    """An error's first line, at most 200 characters of it."""
    return str(error).strip().partition("\n")[0][:200]


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs, or has ended without its parent's notice."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def print_any_error(error: BaseException) -> int:
    """Prints an error as the command would, with a traceback where it is a bug. Returns the exit code."""
    try:
        if not isinstance(error, Exception) or os.environ.get("SSASEG_DEBUG") == "1":
            raise error
        return print_error(error)
    except BaseException:
        traceback.print_exception(error)
        return 1
