"""A classifier's own state on two ranks: computed alike on both, never copied from one to the other."""

import os
import subprocess
import sys
from pathlib import Path

import bank
import pytest
import torch
from bank_ranks import KINDS, train
from places import TESTS

from ssaseg.cli.ranks.launcher import SECRET, environment
from ssaseg.cli.ranks.ranks import Ranks
from ssaseg.models.build import CLASSIFIERS


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Of both ranks after two steps of two micro-batches each, for each classifier."""
    folder, meeting = (tmp_path_factory.mktemp(name) for name in ("peers", "meeting"))
    (meeting / SECRET).write_bytes(b"of these two")
    common = {**environment(2, meeting), "PYTHONPATH": str(TESTS / "helpers"), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "bank_ranks", str(folder)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert not any("find_unused_parameters" in error for error in errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_end_with_equal_state_and_weights(kind: str, states: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    """Nothing is broadcast between the first step and these copies: equal buffers were computed so."""
    first, second = (each[kind] for each in states)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    if kind == "bank":
        assert torch.equal(first["classifier.spare"], torch.ones(3)), "no step touches it, and DDP does not mind"
        assert (first["classifier.bank"] != 0).any()
    assert kind == "protoseg" or first["classifier.pointer"].any()


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_have_the_state_of_one(
    kind: str,
    states: list[dict[str, dict[str, torch.Tensor]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(CLASSIFIERS, "bank", bank.BankClassifier)
    alone = train(tmp_path, Ranks(torch.device("cpu")), kind)
    # After one step: then Adam has made rounding of gradients near 0 into steps of its rate.
    # The bank of `bank` has the order of ranks and micro-batches.
    compared = [key for key in alone if key.startswith("first.") and (kind != "bank" or "prototypes" in key)]
    assert compared
    for key in compared:
        torch.testing.assert_close(states[0][kind][key], alone[key], rtol=1e-5, atol=1e-6)
