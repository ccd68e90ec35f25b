"""Several ranks: the same numbers as one, and an end without hanging, orphans or pages of traceback."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import changes
import numpy as np
import psutil
import pytest
import torch
from changes import Change
from click.testing import CliRunner
from forked_ranks import in_ranks
from rank_work import gradients, meet_twice, wait_in_vain, write_gradients
from tiny import TINY
from torch.distributed import run
from torch.utils._pytree import tree_leaves

from ssaseg.cli.errors import CommandError
from ssaseg.cli.evaluation.report import Request, run_eval
from ssaseg.cli.main import cli
from ssaseg.cli.ranks import launcher as launch
from ssaseg.cli.ranks import ranks as distributed
from ssaseg.cli.ranks.lost import is_loss
from ssaseg.cli.ranks.ranks import Ranks, connect, images_per_rank
from ssaseg.cli.scoring.metrics import Confusion
from ssaseg.cli.signals import StopSignal
from ssaseg.cli.training.preflight import describe
from ssaseg.datasets.loader import train_loader
from ssaseg.datasets.synthetic import SyntheticScenes
from ssaseg.datasets.transforms import TrainTransform

CPU = torch.device("cpu")
TIMEOUT = 180  # seconds, for a command that hangs


# ---- parts, in this process --------------------------------------------------------------------------------------


def test_alone_everything_is_free() -> None:
    ranks = connect(CPU)
    model, tensor = torch.nn.Linear(2, 2), torch.ones(2)
    with ranks:
        assert (ranks.rank, ranks.size, ranks.main) == (0, 1, True)
        assert ranks.wrap(model) is model
        assert ranks.total(tensor) is tensor
        assert (ranks.broadcast("x"), ranks.gather(3), ranks.most(5), ranks.any(False)) == ("x", [3], 5, False)
    with pytest.raises(KeyError), ranks:  # errors pass
        raise KeyError


def test_a_wish_to_stop_is_kept() -> None:
    stop = StopSignal()
    assert not Ranks(CPU).agree(stop)
    stop.number = signal.SIGTERM
    assert Ranks(CPU).agree(stop)
    assert stop.exit_code == 143


def test_batches_are_shared_in_whole_groups() -> None:
    assert [images_per_rank(16, 4, ranks) for ranks in (1, 2, 4)] == [16, 8, 4]
    assert images_per_rank(6, 4, 1) == 6  # alone, the last group may be smaller
    assert images_per_rank(12, 1, 3) == 4
    with pytest.raises(CommandError, match=r"16 images .* among 3 ranks in whole groups of 4 \(distill.group\)"):
        images_per_rank(16, 4, 3)
    with pytest.raises(CommandError, match=r"these numbers of ranks: 1, 2, 4; or another train.batch"):
        images_per_rank(16, 4, 8)
    with pytest.raises(CommandError, match=r"these numbers of ranks: 1, 2, 3, 4, 6, 12; or"):
        images_per_rank(12, 1, 5)


def test_each_rank_reads_its_part_of_the_same_stream() -> None:
    dataset, transform = SyntheticScenes(10, 64, 64, 0, "train"), TrainTransform((32, 32), (0.5, 2.0), (32, 32))

    def positions(count: int, **share: Any) -> list[list[int]]:
        stream = train_loader(dataset, transform, 0, 2, workers=0, start=12, **share)
        return [batch.positions for batch in itertools.islice(stream, count)]

    first, second = (positions(4, rank=rank, ranks=2, batch=8) for rank in (0, 1))
    assert first == [[12, 13], [14, 15], [20, 21], [22, 23]]
    assert second == [[16, 17], [18, 19], [24, 25], [26, 27]]
    alone = positions(8)
    assert sorted(first + second) == alone
    assert positions(8, rank=0, ranks=1, batch=8) == alone


def test_too_few_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.own_gpu(1, 2) == (torch.device("cuda", 1), False)
    with pytest.raises(
        CommandError, match="4 processes on this machine, but only 2 GPUs\nexpected one GPU per process: use --gpus 2"
    ):
        distributed.own_gpu(3, 4)
    monkeypatch.setenv(distributed.SHARE_GPU, "1")
    assert distributed.own_gpu(3, 4) == (torch.device("cuda", 1), True)


def test_compiling_on_several_gpus_is_remarked_upon(
    make_job: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path, "train.compile=true")
    for kind, size, remarks in (("cuda", 2, 1), ("cuda", 1, 0), ("cpu", 2, 0)):
        job.ranks = Ranks(torch.device(kind), 0, size)
        describe(job)
        assert capsys.readouterr().err.count("train.compile was never measured on several GPUs") == remarks


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_counts_of_parts_are_the_count_of_all(ranks: int) -> None:
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 4, (7, 2, 9, 8), dtype=np.uint8)
    whole, parts = Confusion(4), [Confusion(4) for _ in range(ranks)]
    for index, (label, prediction) in enumerate(maps):
        whole.update(prediction, label)
        parts[index % ranks].update(prediction, label)
    parts[0].merge([part.snapshot() for part in parts])
    np.testing.assert_array_equal(parts[0].matrix, whole.matrix)
    np.testing.assert_array_equal(parts[0].rows, whole.rows)
    assert parts[0].interval() == whole.interval()


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2345", True),
        ("NCCL communicator was aborted on rank 0", True),
        ("NCCL error in: NCCLUtils.hpp:268, remote process exited or there was a network error", True),
        ("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?", True),
        ("Net : Connection closed by remote peer node2<42830>", True),
        ("NCCL error in: NCCLUtils.hpp:268, unhandled cuda error (run with NCCL_DEBUG=INFO for details)", False),
        ("NCCL error in: NCCLUtils.hpp:268, invalid usage: Duplicate GPU detected", False),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_errors_about_other_ranks(message: str, lost: bool) -> None:
    assert is_loss(RuntimeError(message)) == lost
    assert not is_loss(CommandError(message))


def test_only_ranks_that_are_gone_are_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "NOTICE", 0.0)
    host, ended = socket.gethostname(), subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    def lost(error: str, *others: tuple[str, int]) -> str | None:
        return Ranks(CPU, size=1 + len(others), peers=[(host, 0), *others]).describe_lost(RuntimeError(error))

    closed, late = "Connection closed by peer\nframe #0", "Timed out waiting 1800000ms for recv"
    assert lost(closed, (host, os.getpid())) is None  # printed unchanged
    assert "rank 2 of 3 has ended" in str(lost(closed, (host, os.getpid()), (host, ended.pid)))
    assert "a rank on another machine has ended" in str(lost(closed, ("elsewhere", 1)))
    assert "the error in this rank: Connection closed by peer\n" in str(lost(closed, ("elsewhere", 1)))
    assert "30 minutes for another rank, which is alive (Timed out" in str(lost(late, (host, os.getpid())))
    assert "which may be on a lost machine" in str(lost(late, ("elsewhere", 1)))
    assert "rank 1 of 2 has ended" in str(lost(late, (host, ended.pid)))


# ---- whole ranks, over gloo on 127.0.0.1 --------------------------------------------------------------------------

KEYS = [
    *TINY, "data.synthetic.val=3", "train.batch=8", "train.workers=1", "optim.ema=0.9", "optim.grad_clip=1",
]  # fmt: skip
# The command in a process like a user's, that of rank 1 killed.
DYING = [sys.executable, changes.__file__, changes.rank_1_killed_in_step_4.__name__]
TEACHER = ("teacher_ce", "teacher_dice", "response", "semantic", "spatial")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def train_words(out: Path, *words: str) -> list[str]:
    return ["train", "demo", *KEYS, "--device", "cpu", "--out", str(out), *words]


def train(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str, change: Change | None = None) -> int:
    """Exit code of `ssaseg train` on two ranks, after the change."""
    return in_ranks(monkeypatch, 2, changes.command, train_words(out, *words), *([change] if change else []))


def same_state(first: Path, second: Path) -> None:
    """The last states of two runs: weights, statistics and the optimiser's moments, bit for bit."""
    ours, theirs = (torch.load(folder / "state-6.pt", weights_only=True) for folder in (first, second))
    assert ours["progress"] == theirs["progress"]
    assert ours["extra"]["ema"]
    for part in ("model", "optimizer", "extra"):
        a, b = (tree_leaves(state[part]) for state in (ours, theirs))
        for mine, other in zip(a, b, strict=True):
            assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other


def test_ranks_meet_whatever_each_machine_has_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a store like torchrun's, which keeps what ranks of earlier starts have left in it."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("ssaseg/call/1", "of an earlier start")
    own = launch.environment
    agents = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def of_torchrun(count: int, meeting: Path) -> dict[str, str]:
        return {key: value for key, value in own(count, meeting).items() if key != launch.LAUNCHED} | agents

    monkeypatch.setattr(launch, "environment", of_torchrun)
    assert in_ranks(monkeypatch, 2, meet_twice) == 0


def test_a_rank_that_waits_in_vain_names_what_may_take_long(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.2)
    assert in_ranks(monkeypatch, 2, wait_in_vain, 4, 20) == 2
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 3
    assert told[0].startswith("error: rank 1 of 2 waited")
    assert "--check all" in told[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert train(monkeypatch, out) == 0
    return out


def assert_equal_to_one_rank(
    monkeypatch: pytest.MonkeyPatch, folder: Path, device: str, kinds: list[list[str]], tolerance: float
) -> None:
    """Losses and gradients of a step on two ranks against those of one that has the whole batch at once."""
    assert in_ranks(monkeypatch, 2, write_gradients, folder, device, kinds) == 0
    both = [torch.load(folder / f"{rank}.pt", weights_only=True, map_location=device) for rank in (0, 1)]
    for overrides, first, second in zip(kinds, *both, strict=True):
        losses, expected = gradients(Ranks(torch.device(device)), [*overrides, "train.micro_batch=8"])
        assert first[0] == pytest.approx(losses, abs=tolerance)
        assert first[1].keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.equal(first[1][name], second[1][name])
            torch.testing.assert_close(first[1][name], gradient, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("one_thread")
def test_two_ranks_have_the_losses_and_gradients_of_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With BatchNorm's statistics fixed, as without SyncBatchNorm they are those of a micro-batch."""
    fixed = [*KEYS, "optim.freeze=[norm]", "model.dropout=0", "model.drop_path=0", "train.workers=0"]
    kinds = [[*fixed, f"model.classifier={kind}"] for kind in ("ssa", "linear")]
    # Parameters without a gradient: the teacher's, where nothing is learnt from it.
    kinds.append([*kinds[0], *(f"loss.weights.{term}=0" for term in TEACHER)])
    assert_equal_to_one_rank(monkeypatch, tmp_path, "cpu", kinds, 1e-5)


@pytest.mark.gpu
def test_two_ranks_that_share_a_gpu_have_the_gradients_of_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """BatchNorm trains: SyncBatchNorm has the statistics of all ranks' images. Over gloo, as NCCL wants a GPU each."""
    monkeypatch.setenv(distributed.SHARE_GPU, "1")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    live = [*KEYS, "model.dropout=0", "model.drop_path=0", "train.workers=0", "train.micro_batch=null"]
    crop = ["augment.scale=[128,128]", "augment.crop=[128,128]"]
    assert_equal_to_one_rank(monkeypatch, tmp_path, "cuda", [[*live, *crop]], 1e-4)


def test_a_run_of_two_ranks_has_one_log_and_one_state(undisturbed: Path) -> None:
    records = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [2, 4, 6]
    assert [record["step"] for record in records if "mIoU" in record] == [3, 6]
    assert json.loads((undisturbed / "env.json").read_text())["ranks"] == 2
    assert sorted(path.name for path in undisturbed.glob("state-*")) == ["state-4.pt", "state-6.pt"]


def test_a_killed_rank_ends_the_job_with_three_lines(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """After a run that has started what processes are forked from."""
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(
        CommandError, match=r"rank 1 by SIGKILL, of 2 ranks(.|\n)*--resume continues from the last saved state"
    ):
        train(monkeypatch, tmp_path / "run", "train.workers=0", change=changes.rank_1_killed_in_step_4)
    left = set(psutil.Process().children(recursive=True)) - before
    assert psutil.wait_procs(left, timeout=10)[1] == []
    told = capfd.readouterr().err
    assert "Traceback" not in told
    assert "error" not in told
    assert (tmp_path / "run" / "state-3.pt").exists()


@pytest.mark.slow
def test_torchrun_goes_on_by_itself_and_ends_bit_for_bit(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", run.__name__, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [*torchrun, *DYING[1:], *train_words(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    same_state(out, undisturbed)
    assert done.stderr.count("error: rank 1 of 2 has ended: it was killed from outside") == 1
    # It was killed in the fourth step, and its last state is that after the evaluation of step 3.
    assert "step 3 of 6" in done.stderr
    told = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in told] == [2, 3, 4, 6, 6]


def test_a_signal_saves_once_and_one_rank_can_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"

    def stop_soon() -> None:
        until = time.monotonic() + TIMEOUT
        while not (out / "state-2.pt").exists() and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_soon)
    thread.start()
    assert train(monkeypatch, out, change=partial(changes.slow_steps, 0.3)) == 143
    thread.join()
    told = capfd.readouterr().err
    assert told.count("state saved, continue with --resume") == 1
    assert "Traceback" not in told
    result = CliRunner().invoke(cli, ["train", "demo", *KEYS, "--device", "cpu", "--out", str(out), "--resume"])
    assert result.exit_code == 0, result.output
    assert "ranks 2 → 1" in result.stderr
    assert (out / "state-6.pt").exists()


def test_an_image_that_one_rank_cannot_read_is_told_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 meets it; rank 0 saves what was learnt, and says no more."""
    words = ("train.save_every=1000", "train.eval_every=1000")
    assert train(monkeypatch, tmp_path / "run", *words, change=partial(changes.unreadable_at, 8 * 3 + 5)) == 2
    told = capfd.readouterr().err
    assert told.count("error: image7.png: cannot be decoded\nexpected PNG") == told.count("error") == 1
    assert told.count("stopped after step 3; state saved") == 1
    assert (tmp_path / "run" / "state-3.pt").exists()


@pytest.mark.usefixtures("one_thread")
def test_eval_on_three_ranks_is_eval_on_one(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Seven images: three, two and two."""
    recipe = tmp_path / "seven.yaml"
    recipe.write_text((undisturbed / "config.yaml").read_text().replace("val: 3", "val: 7"))
    checkpoint, reports = undisturbed / "best.safetensors", {}
    pictures: dict[int, list[str]] = {}
    for count in (1, 3):
        file = tmp_path / f"{count}.json"
        command = ["eval", str(checkpoint), "--data", str(recipe), "--json", str(file), "--device", "cpu"]
        page = tmp_path / str(count)
        if count == 1:
            assert run_eval([checkpoint], Request(data=str(recipe), report=page), str(file), "cpu") == 0
        else:
            capfd.readouterr()
            assert in_ranks(monkeypatch, count, changes.command, [*command, "--report", str(page)]) == 0
            assert capfd.readouterr().out.count("mIoU 95 % interval") == 1
        reports[count] = json.loads(file.read_text())
        del reports[count]["images_per_s"], reports[count]["time"]
        pictures[count] = re.findall(r'src="(data:[^"]+)"', (page / "report.html").read_text())
    assert reports[3]["images"] == 7
    assert reports[3] == reports[1]
    assert len(pictures[1]) == 4 * 7
    assert pictures[3] == pictures[1]
