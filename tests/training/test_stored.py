"""What a training state holds is checked before it is used: a state may come from somewhere else."""

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from states import save

from ssaseg.cli.errors import CommandError
from ssaseg.cli.training.build import load_stored
from ssaseg.cli.training.environment import read_environment, resumptions, write_environment
from ssaseg.cli.training.job import Job
from ssaseg.cli.training.log import read_log
from ssaseg.cli.training.saving import save as save_job
from ssaseg.cli.training.state import load_state, state_files
from ssaseg.cli.weights.archive import read_archive

MakeJob = Callable[..., Job]

pytestmark = pytest.mark.usefixtures("one_thread")

NEST: Any = []
for _ in range(200):
    NEST = [NEST]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (3, 5):
        save(tmp_path, step)
    return tmp_path


def moments(state: Any) -> Any:
    return state["optimizer"]["state"][0]


# Each a change of a good state, as Python: what no state of ours could hold.
CHANGES = [
    # tensors of the optimiser
    "moments(state)['exp_avg'] = torch.zeros(3)",
    "moments(state)['exp_avg_sq'] = torch.zeros(0)",
    "moments(state)['exp_avg'] = moments(state)['exp_avg'].double()",
    "moments(state)['exp_avg'] = torch.zeros(1, 1, dtype=torch.int64)",
    "moments(state)['exp_avg'] = moments(state)['exp_avg_sq']",
    "moments(state)['exp_avg'] = torch.zeros(1).to_sparse()",
    "moments(state)['exp_avg'] = torch.zeros(1, 1, device='meta')",
    "moments(state)['exp_avg'] = torch.zeros(1, 1, requires_grad=True).bool()",
    "moments(state)['exp_avg'] = 0.5",
    "moments(state)['step'] = torch.tensor([1.0, 2.0])",
    "moments(state)['step'] = torch.tensor(-1.0)",
    "moments(state)['step'] = torch.tensor(float('nan'))",
    "moments(state)['more'] = torch.zeros(1, 1)",
    "del moments(state)['step']",
    "state['optimizer']['state'] = {}",
    "state['optimizer']['state'][7] = moments(state)",
    "state['optimizer']['state']['0'] = moments(state)",
    # groups of the optimiser
    "state['optimizer'] = {}",
    "state['optimizer']['param_groups'] = []",
    "state['optimizer']['param_groups'] *= 2",
    "state['optimizer']['param_groups'][0]['params'] = [0, 1]",
    "state['optimizer']['param_groups'][0]['params'] = [True]",
    "state['optimizer']['param_groups'][0]['names'] = ['other']",
    "state['optimizer']['param_groups'][0]['names'] = 'weight'",
    "state['optimizer']['param_groups'][0]['eps'] = 'small'",
    "state['optimizer']['param_groups'][0]['betas'] = (0.9, float('nan'))",
    "state['optimizer']['param_groups'][0]['weight_decay'] = torch.zeros(1)",
    # the model
    "state['model'] = {}",
    "state['model']['weight'] = torch.zeros(2, 1)",
    "state['model']['weight'] = torch.full((1, 1), float('inf'))",
    "state['model'][5] = torch.zeros(1)",
    "state['model']['weight'] = [1.0]",
    # the progress
    "state['progress'] = {}",
    "state['progress'] = None",
    "state['progress']['bogus'] = 1",
    "state['progress']['step'] = -1",
    "state['progress']['step'] = 5.0",
    "state['progress']['step'] = True",
    "state['progress']['step'] = 10**30",
    "state['progress']['evaluated'] = 6",
    "state['progress']['best_miou'] = 'good'",
    "state['progress']['best_miou'] = float('nan')",
    "state['progress']['best_miou'] = 101",
    "state['progress']['scores'] = [1]",
    "state['progress']['scores'] = {'mIoU': {}}",
    "state['progress']['stale'] = -1",
    "state['progress']['skipped'] = 6",
    # the rest
    "state['scaler'] = {'scale': 1.0}",
    "state['scaler'] = 1",
    "state['recipe'] = None",
    "state['recipe'] = {}",
    "state['recipe']['train']['steps'] = 4",
    "state['recipe']['optim']['ema'] = 0.9",
    "state['extra'] = 5",
    "state['extra']['more'] = 1",
    "state['extra']['ema'] = {'weight': torch.zeros(1, 1)}",
    "state['extra']['data'] = [1]",
    "state['extra']['data']['train']['images'] = '2'",
    "state['extra']['data']['train']['classes'] = 7",
    "state['extra']['data']['test'] = {}",
    "state['later'] = 1",
    "state['recipe'] = NEST",
    "state.clear()",
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_with_other_values_is_not_used(folder: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "state-5.pt"
    state = torch.load(path, weights_only=True)
    exec(change)
    torch.save(state, path)
    found = load_state(folder)
    assert found is not None
    assert found["progress"]["step"] == 3
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "state-5.pt cannot be read (" in told[0]
    assert (folder / "state-5.pt.unreadable").exists()


def test_a_good_state_is_read_as_it_is(folder: Path) -> None:
    assert load_state(folder) is not None
    found, expected = read_archive(folder / "state-5.pt"), torch.load(folder / "state-5.pt", weights_only=True)
    assert str(found) == str({**expected, "model": dict(expected["model"])})
    # A run that never took a step has no moments.
    os.rename(folder / "state-5.pt", folder / "state-4.pt")
    assert load_state(folder)["progress"]["step"] == 3  # type: ignore[index]  # not the step in its name


def test_a_state_that_waits_or_never_ends(folder: Path) -> None:
    os.mkfifo(folder / "state-9.pt")
    (folder / "state-8.pt").symlink_to("/dev/zero")
    (folder / "state-7.pt").mkdir()
    found = load_state(folder)
    assert found is not None
    assert found["progress"]["step"] == 5
    assert [path.name for path in state_files(folder)] == ["state-5.pt", "state-3.pt"]


# ---- the run's own network -----------------------------------------------------------------------------------------
def test_a_state_of_another_network(tmp_path: Path, make_job: MakeJob) -> None:
    """Consistent in itself, but not what this run's optimiser has."""
    job = make_job(tmp_path, "optim.ema=0.5")
    job.progress.step = 1
    for parameter in job.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    job.optimizer.step()
    save_job(job)
    parts = (job.model, job.optimizer, job.scaler, job.average)
    assert load_stored(load_state(tmp_path) or {}, tmp_path, *parts).step == 1

    def refused(change: Callable[[Any], object]) -> str:
        stored = load_state(tmp_path)
        change(stored)
        before = {key: value.clone() for key, value in job.model.state_dict().items()}
        with pytest.raises(CommandError, match="the state does not belong to this network") as caught:
            load_stored(stored or {}, tmp_path, *parts)
        assert len(str(caught.value).splitlines()) == 2
        assert all(torch.equal(value, before[key]) for key, value in job.model.state_dict().items())
        return str(caught.value)

    def group(stored: Any) -> Any:
        return stored["optimizer"]["param_groups"][0]

    assert "in the place of" in refused(lambda stored: group(stored)["names"].reverse())
    assert "weight_decay 5" in refused(lambda stored: group(stored).update(weight_decay=5.0))
    assert "amsgrad True" in refused(lambda stored: group(stored).update(amsgrad=True))
    assert "2 groups" in refused(lambda stored: stored["optimizer"]["param_groups"].append(group(stored)))
    assert "averages" in refused(lambda stored: stored["extra"]["ema"].popitem())
    first = next(iter(job.model.state_dict()))
    assert "float16" in refused(lambda stored: stored["model"].update({first: stored["model"][first].half()}))


# ---- the file ------------------------------------------------------------------------------------------------------
def rewrite(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))


def test_records_that_are_not_what_pytorch_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"

    def reason(content: Any, change: Callable[[str, bytes], bytes] = lambda _, it: it, **more: int) -> str:
        torch.save(content, path)
        rewrite(path, change, **more)
        with pytest.raises(Exception) as caught:
            read_archive(path)
        return str(caught.value)

    weight = {"weight": torch.arange(6.0).view(2, 3)}
    assert "compressed" in reason(weight, compression=zipfile.ZIP_DEFLATED)
    assert "which is not there" in reason(weight, lambda name, it: it[:-4] if name.endswith("data/0") else it)
    assert "byte order" in reason(weight, lambda name, it: b"big" if name.endswith("byteorder") else it)
    assert "expanded" in reason({"x": torch.zeros(1).expand(10**10)})
    whole = torch.zeros(5000)
    assert "larger than the file" in reason([whole[start:] for start in range(9)])
    for odd in (torch.zeros(1, dtype=torch.complex64), torch.zeros(2).to_sparse(), Path("x"), {1.5: 1}, 10**30, {1}):
        assert reason({"x": odd})


def test_a_pickle_calls_nothing(tmp_path: Path) -> None:
    """Neither what it names, nor what stands in for that."""
    torch.save(OrderedDict(x=torch.zeros(1)), tmp_path / "x.pt")

    class Runs:
        def __init__(self, function: Any, *given: Any) -> None:
            self.result = function, given

        def __reduce__(self) -> Any:
            return self.result

    marker = tmp_path / "marker"
    for content in (
        Runs(os.mkdir, str(marker)),
        Runs(bytearray, 10**12),
        Runs(torch._utils._rebuild_tensor_v2, 1, 2, 3, 4),
        Runs(torch._utils._rebuild_qtensor, 1),
        torch._utils._rebuild_tensor_v2,
    ):
        torch.save(OrderedDict(x=torch.zeros(1)), tmp_path / "x.pt")
        pickled = pickle.dumps(content, protocol=2)
        rewrite(tmp_path / "x.pt", lambda name, it, new=pickled: new if name.endswith("data.pkl") else it)  # type: ignore[misc]
        with pytest.raises(Exception):  # noqa: B017 (several types)
            read_archive(tmp_path / "x.pt")
    assert not marker.exists()


def test_tensors_have_memory_of_their_own(tmp_path: Path) -> None:
    """Optimisers write into them: of tensors that overlap, each keeps its values."""
    whole = torch.arange(12.0)
    content = {"a": whole.view(3, 4).T, "b": whole[2:4], "c": torch.arange(9.0).as_strided((3, 3), (1, 1))}
    torch.save(content, tmp_path / "x.pt")
    found = read_archive(tmp_path / "x.pt")
    assert all(torch.equal(found[key], value) for key, value in content.items())
    assert found["a"].stride() == (1, 4), "as dense as it was, in the same order"
    for value in found.values():
        value.zero_()
    assert [value.untyped_storage().nbytes() for value in found.values()] == [48, 8, 36]


def test_shared_lists_do_not_multiply(tmp_path: Path) -> None:
    content: Any = ["x"] * 9
    for _ in range(12):
        content = [content] * 9
    torch.save({"x": content}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="too many"):
        read_archive(tmp_path / "x.pt")


# ---- env.json and metrics.jsonl ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 60 + "1" + "}" * 60, "[1]", '{"resumed": {}}', '{"resumed": [{"step": "1"}]}',
     '{"resumed": [3]}', '{"resumed": [{"step": -1}]}', '{"resumed": [{"step": true}]}', '{"threads": []}',
     '{"gpu": "' + "x" * 300 + '"}', '{"threads": ' + "9" * 5000 + "}", "\udc80"],
)  # fmt: skip
def test_an_environment_that_is_not_one(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "env.json"
    path.write_text(text, errors="surrogateescape")
    assert resumptions(tmp_path) == []
    write_environment(path, {"torch": "2"}, 3)
    assert "cannot be read, kept as env.json.unreadable" in capsys.readouterr().err
    assert read_environment(path)["step"] == 3


def test_changes_of_the_environment_are_printable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "env.json").write_text(json.dumps({"gpu": "\x1b[2J"}))
    write_environment(tmp_path / "env.json", {"gpu": "b"}, 3)
    assert r"gpu \x1b[2J → b" in capsys.readouterr().err


def test_records_that_are_none(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "loss": 2.5}', '{"step": true}', '{"step": -1}', '{"step": 1' + "0" * 30 + "}", '{"step": 1.5}',
        '{"step": 1, "loss": "2"}', '{"step": 1, "loss": [1]}', '{"step": 1, "IoU": [1]}',
        '{"step": 1, "IoU": {"a": ""}}',
        '{"step": 1, "mIoU": 1e308}', '{"step": 1, "loss": 1' + "0" * 4000 + "}", "[" * 5000, "9" * 5000,
        '{"step": 1, "x": "' + "y" * 2**20 + '"}', '{"step": 2, "mIoU": 50.0, "IoU": {"a": null, "b": 50}}',
        '{"step": 3, "loss": NaN}',
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4']))
    records, damaged = read_log(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert damaged >= len(lines) - 3
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read_log(tmp_path / "pipe")
