"""Ranks: processes that train or evaluate one model together, started by `--gpus N` or by torchrun.

Each rank computes on its own images, and all ranks have the same weights. Only rank 0 reads training states, writes
files and prints. It sends to the others what they need, so that they need no access to its disk. Messages between hosts
(requests to stop, scores, errors) go through gloo and read nothing from a GPU. Gradients and BatchNorm's statistics go
through NCCL between GPUs, and through gloo between CPUs.
"""

import contextlib
import os
import signal
import socket
import sys
import time
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
from ssaseg.cli.errors import CommandError, muted
from ssaseg.cli.ranks.launcher import require_environment
from ssaseg.cli.ranks.lost import first_line, is_alive, is_late, is_loss, print_any_error
from ssaseg.cli.ranks.messages import pack, unpack
from ssaseg.cli.ranks.rendezvous import meet, require_own
from ssaseg.cli.signals import StopSignal
from ssaseg.models.layers import norm_statistics

# How long a rank waits for another rank, for example for rank 0 while it checks every label of a large data set. If a
# rank ends, the ranks that wait for it in gloo notice this sooner, because its connections close. A rank that waits in
# CUDA, as in each SyncBatchNorm, notices it only if NCCL does, or after this time. `--gpus` and torchrun soon end the
# ranks of their own machine; but with several machines and --max-restarts 0, those of the others may wait this long.
PATIENCE = timedelta(minutes=30)


NOTICE = 2.0  # seconds until the parent of a rank that has ended notices it

SETTLE = 0.2  # seconds for gloo's threads to release their tensors

met = False  # whether this process is, or has been, one of several ranks

SHARE_GPU = "SSASEG_SHARE_GPU"  # =1: several ranks may use one GPU, over gloo; for tests


class PeerFailed(Exception):
    """Ends a rank because another rank has failed; that rank reports the error."""


@dataclass
class Ranks:
    """This process among `size` ranks, and what the ranks do together. With one rank (size 1), methods cost nothing.

    All ranks must call the same methods in the same order. As a context: an error in one rank soon ends all ranks, and
    is printed once.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    store: Any = None  # key-value store that all ranks use
    peers: Sequence[tuple[str, int]] = ()  # host and process number of each rank
    parent: int = field(default_factory=os.getppid)

    @property
    def main(self) -> bool:
        """Whether this rank is the one that prints and writes."""
        return self.rank == 0

    # ---- messages between hosts ----------------------------------------------------------------------------------

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
        """Whether any rank has a request to stop. If so, all ranks get it, and with it the same exit code.

        A rank whose launcher has ended also requests a stop: nothing else would end it.
        """
        number = stop.number or 0
        if self.size > 1 and os.getppid() != self.parent:
            number = signal.SIGTERM
        agreed = self.most(number)
        if agreed:  # never set back to None: a signal may have arrived in the meantime
            stop.number = agreed
        return agreed > 0

    def broadcast(self, value: Any) -> Any:
        """Sends rank 0's `value` to all ranks and returns it; of the types that `pack` takes."""
        if self.size == 1:
            return value
        message = pack(value) if self.main else torch.empty(0, dtype=torch.uint8)
        buffer = torch.empty(self.most(len(message)), dtype=torch.uint8)
        buffer[: len(message)] = message
        dist.broadcast(buffer, src=0)
        return value if self.main else unpack(buffer)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in the order of ranks, on all ranks; of the types that `pack` takes."""
        if self.size == 1:
            return [value]
        message = pack(value)
        longest = self.most(len(message))
        padded = torch.zeros(8 + longest, dtype=torch.uint8)  # the length, then the message
        padded[:8] = torch.tensor([len(message)]).view(torch.uint8)
        padded[8 : 8 + len(message)] = message
        found = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(found, padded)
        return [unpack(each[8 : 8 + int(each[:8].view(torch.int64))]) for each in found]

    def barrier(self) -> None:
        """Waits until every rank has reached this call."""
        self.most(0)

    # ---- tensors on the device -----------------------------------------------------------------------------------

    def total(self, tensor: Tensor) -> Tensor:
        """Sum of the ranks' tensors, on the device; the host does not wait for the GPU."""
        if self.size == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    def same_statistics(self, model: nn.Module) -> None:
        """Copies rank 0's statistics of norms to all ranks; without SyncBatchNorm they differ. Other buffers are a
        classifier's: every rank has computed them from the same numbers.
        """
        self.same_buffers(list(norm_statistics(model).values()))

    def same_buffers(self, every: Sequence[Tensor]) -> None:
        """Copies rank 0's values of these buffers to all ranks."""
        if self.size == 1:
            return
        with torch.no_grad():
            # Not a set of types: its order differs between processes.
            for kind in dict.fromkeys(buffer.dtype for buffer in every):
                buffers = [buffer for buffer in every if buffer.dtype == kind]
                together = torch.cat([buffer.flatten() for buffer in buffers])
                dist.broadcast(together, src=0)
                for buffer, values in zip(buffers, together.split([b.numel() for b in buffers]), strict=True):
                    buffer.copy_(values.view_as(buffer))

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` with rank 0's weights and gradients averaged over ranks; on GPUs, BatchNorm uses all ranks' images.

        PyTorch's SyncBatchNorm reads back which ranks had images. So in a training step, at each norm, the host waits
        for its GPU and thus for the other ranks: steps on several GPUs are not queued ahead as steps on one GPU are.

        PyTorch searches for parameters without gradient in each step; they keep their values. With one rank: returns
        the model itself.
        """
        if self.size == 1:
            return model
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.same_buffers(list(model.buffers()))
        gpus = [self.device] if on_gpu else None
        # A warning about weights such as (96,1,3,3), whose strides can be written in two ways.
        warnings.filterwarnings("ignore", "Grad strides do not match", UserWarning)
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified", UserWarning)
        with warnings.catch_warnings():
            # Buffers are not sent before each step, since training reads none of them. PyTorch 2.13 renames this
            # option; older versions know only this name.
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
                self.barrier()  # the other ranks may still read the store, which rank 0 may hold
                dist.destroy_process_group()
                # Threads of gloo may still hold the last tensors. A thread that releases them only while Python ends
                # aborts the process. A model in a reference cycle keeps the threads alive until then.
                time.sleep(SETTLE)
                return
            except RuntimeError as late:
                error = late
        self._end(error)

    def _end(self, error: BaseException) -> NoReturn:
        """Ends this process with the error's exit code. Of all ranks that fail, only one prints the reason.

        It ends immediately, without Python's cleanup: there a GPU would wait for ranks that have ended.
        """
        for each in (signal.SIGINT, signal.SIGTERM):  # torchrun sends one soon, but the error must still be printed
            signal.signal(each, signal.SIG_IGN)
        code = None
        if isinstance(error, PeerFailed):
            code = self._first_code(seconds=10.0) or 1  # that rank may have to end its workers first
        elif is_loss(error) or is_late(error):
            code = self._first_code(seconds=0.5)
            lost = None if code else self.describe_lost(error)
            if lost and LAUNCHED in os.environ and not is_late(error):
                code = 1  # the launcher knows which rank ended first, and how
            elif lost:
                error = CommandError(lost)
        if code is None:
            code = self._print_first(error)
        leave(code)

    def _print_first(self, error: BaseException) -> int:
        """Prints the error, unless another rank has already printed one. Returns the error's exit code."""
        try:
            first = self.store.add("failures", 1) == 1
        except RuntimeError:
            # The store has ended together with rank 0. Rank 0 has printed the reason, or the launcher prints it.
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
        """The exit code of the rank that printed the error; None if no rank has printed one within `seconds`."""
        until = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):  # the store may have ended, too
            while time.monotonic() < until:
                if self.store.check(["code"]):
                    return int(self.store.get("code"))
                time.sleep(0.05)
        return None

    def describe_lost(self, error: BaseException) -> str | None:
        """Says which ranks have ended or are late; None if all are alive. Cannot check processes of other machines."""
        others = [(rank, *place) for rank, place in enumerate(self.peers) if rank != self.rank]
        here = [(rank, pid) for rank, host, pid in others if host == socket.gethostname()]
        until = time.monotonic() + NOTICE
        while all(is_alive(pid) for _, pid in here) and time.monotonic() < until:
            time.sleep(0.05)
        gone = [str(rank) for rank, pid in here if not is_alive(pid)]
        all_here = len(here) == len(others)
        if not gone and is_late(error):
            return (
                f"rank {self.rank} of {self.size} waited {PATIENCE.total_seconds() / 60:g} minutes for another rank, "
                f"{'which is alive' if all_here else 'which may be on a lost machine'} ({first_line(error)})\n"
                "only rank 0 checks the labels, and with --check all this may take longer\n"
                "run `ssaseg data check` first, as a separate command, and leave out --check all"
            )
        if not gone and all_here:
            return None
        who = f"rank {', '.join(gone)} of {self.size}" if gone else "a rank on another machine"
        return (
            f"{who} has ended: it was killed from outside, or its machine was lost\n"
            f"the error in this rank: {first_line(error)}\n"
            "continue from the last saved state with --resume; torchrun does so by itself with --max-restarts"
        )


def leave(code: int) -> NoReturn:
    """Ends this process without Python's cleanup, in which gloo's threads may abort it and NCCL's threads may hang."""
    for child in active_children():  # they would check for this process only every five seconds
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def connect(device: torch.device) -> Ranks:
    """Connects with the other ranks that torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*) describes.

    Without that environment there is one rank. `device`: only its type is used; `Ranks.device` is this rank's own.
    Raises CommandError if there are fewer GPUs than ranks, if the environment is not complete, or if the ranks do not
    connect.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return Ranks(device)
    require_environment()
    size = int(os.environ["WORLD_SIZE"])
    backend = "gloo"
    if device.type == "cuda":
        device, several = own_gpu(
            int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
        )
        torch.cuda.set_device(device)
        backend = "gloo" if several else "cpu:gloo,cuda:nccl"
    try:
        store, rank, size = meet(PATIENCE)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        require_own(rank, size)
        ranks = Ranks(device, rank, size, dist.PrefixStore("ssaseg", store))
        ranks.peers = ranks.gather((socket.gethostname(), os.getpid()))
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or is_loss(error) or is_late(error)):
            raise
        raise CommandError(
            f"rank {os.environ['RANK']} of {size} could not connect with the others: {first_line(error)}\n"
            "another rank ended earlier, or MASTER_ADDR and MASTER_PORT cannot be reached over the network",
            exit_code=1,
        ) from None
    global met
    met = True
    return ranks


def own_gpu(local_rank: int, here: int) -> tuple[torch.device, bool]:
    """The GPU of one of `here` ranks on this machine; whether others use it, too. CommandError if there are too few."""
    count = torch.cuda.device_count()
    if here <= count:
        return torch.device("cuda", local_rank), False
    if os.environ.get(SHARE_GPU) == "1":
        return torch.device("cuda", local_rank % count), True
    raise CommandError(
        f"{here} processes on this machine, but only {count} GPU{'s' if count > 1 else ''}\n"
        f"expected one GPU per process: use --gpus {count}, or torchrun --nproc-per-node {count}"
    )


def was_restarted() -> bool:
    """Whether torchrun has restarted this rank after a failure: the run then resumes by itself, without --resume.

    Combine the answers of all ranks (`Ranks.any`): each machine counts only its own failures, and a machine that
    replaced another has counted none. Machines that join without a failure (`--nnodes 1:4`, growing) are not supported:
    no machine counts a failure then, and the run ends with the error that the run folder is not empty.
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def under_torchrun() -> bool:
    """Whether torchrun has started this process. It restarts a run that ends with an exit code other than 0."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def images_per_rank(batch: int, group: int, ranks: int) -> int:
    """How many of a step's `batch` images each rank takes; with several ranks, a multiple of `group` (1: any number).

    Raises CommandError, which lists the possible numbers of ranks, if the batch cannot be divided like this.
    """
    fits = [count for count in range(1, batch + 1) if count == 1 or batch % (count * group) == 0]
    if ranks in fits:
        return batch // ranks
    whole = f" in whole groups of {group} (distill.group)" if group > 1 else ""
    shown = ", ".join(map(str, fits))
    raise CommandError(
        f"train.batch: {batch} images cannot be divided among {ranks} ranks{whole}\n"
        f"expected one of these numbers of ranks: {shown}; or another train.batch"
    )


def averaging(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """A context for a micro-batch's forward and backward pass: only the `last` one averages gradients over ranks."""
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
