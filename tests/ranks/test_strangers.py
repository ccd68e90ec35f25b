"""Strangers among ranks: nobody can reach those of one machine, and no message runs code. All on 127.0.0.1."""

import pickle
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from forked import Forked
from forked_ranks import in_ranks
from rank_work import Evil, exchange, meet_at, play_rank_1, show_another_secret

from ssaseg.cli.errors import CommandError
from ssaseg.cli.ranks import launcher
from ssaseg.cli.ranks.messages import pack, unpack


def listening_ports() -> dict[int, str]:
    """Ports of this machine that a process of this user listens at, with the address."""
    sockets = psutil.net_connections(kind="inet")
    return {each.laddr.port: each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN}


def test_an_attacker_finds_no_port_to_join_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It tries every port that opens while the ranks run, as a store, in the part of rank 1."""
    marker, before, tried = tmp_path / "executed", set(listening_ports()), dict[int, str]()
    done = threading.Event()

    def attack() -> None:
        while not done.is_set():
            for port, address in listening_ports().items():
                if port in before or port in tried:
                    continue
                tried[port] = address
                with socket.socket() as client:
                    client.settimeout(0.2)
                    try:
                        client.connect((address, port))
                        client.sendall(pickle.dumps(Evil(marker)))
                    except OSError:
                        pass
            time.sleep(0.02)

    attacker = threading.Thread(target=attack)
    attacker.start()
    try:
        code = in_ranks(monkeypatch, 2, exchange, tmp_path, 2.0)
    finally:
        done.set()
        attacker.join()
    assert code == 0
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["[0, 1] ['127.0.0.1']"] * 2
    assert tried, "gloo listens at a port of its own: the attacker must have seen one"
    assert set(tried.values()) == {"127.0.0.1"}
    assert not marker.exists()


def test_a_process_without_the_secret_is_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "GRACE", 0.2)
    assert in_ranks(monkeypatch, 2, show_another_secret) != 0
    assert "has connected as rank" in capfd.readouterr().err


def test_a_stranger_at_the_port_of_torchrun_runs_no_code(tmp_path: Path) -> None:
    """There a stranger can join, as documented, and spoil the results; but what it sends is data."""
    marker = tmp_path / "executed"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rank_0 = Forked(meet_at, port, errors=tmp_path / "errors.txt")
    stranger = Forked(play_rank_1, port, marker, errors=tmp_path / "stranger.txt")
    assert stranger.wait() == 0, (tmp_path / "stranger.txt").read_text()
    assert rank_0.wait() == 2
    assert (tmp_path / "errors.txt").read_text().startswith("error: a message from another rank cannot be read")
    assert not marker.exists()


def test_a_pickle_runs_code_where_it_is_unpickled(tmp_path: Path) -> None:
    """Otherwise the tests above would show nothing."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_values_arrive_as_they_were_sent() -> None:
    value = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3).T}, 1: {}},
        "groups": [{"betas": (0.9, 0.999), "lr": 0.1 + 0.2, "params": [0, 1]}],
        "half": torch.arange(4).to(torch.bfloat16),
        "empty": torch.empty(0, 2, dtype=torch.int32),
        (1, "tuple"): [None, True, False, 2**70, float("inf"), "Straße \ud800"],
    }
    got = unpack(pack(value))
    assert repr(got) == repr(value)
    assert torch.equal(got["state"][0]["exp_avg"], value["state"][0]["exp_avg"])  # type: ignore[index]
    assert got["half"].dtype == torch.bfloat16
    assert torch.equal(unpack(pack(np.arange(6).reshape(2, 3))), torch.arange(6).reshape(2, 3))
    assert unpack(pack(None)) is None
    shared = torch.zeros(4)
    assert [each.tolist() for each in unpack(pack([shared, shared[:2]]))] == [[0] * 4, [0] * 2]


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", timedelta(1), [Path()]])
def test_other_values_are_not_sent(value: object) -> None:
    with pytest.raises(TypeError, match="ranks cannot send"):
        pack(value)


def test_messages_of_strangers_are_refused(tmp_path: Path) -> None:
    whole = pack({"a": torch.arange(10)}).numpy().tobytes()
    changed = [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(0, 80, 3)]
    evil = pickle.dumps(Evil(tmp_path / "executed"))
    refused = 0
    for content in (b"", b"\0" * 40, whole[:-1], whole[:20], evil, b"\xff" * 64, *changed):
        try:
            unpack(
                torch.frombuffer(bytearray(content), dtype=torch.uint8)
                if content
                else torch.empty(0, dtype=torch.uint8)
            )
        except CommandError:
            refused += 1
    assert refused >= 6 + len(changed) // 2
    assert not (tmp_path / "executed").exists()
