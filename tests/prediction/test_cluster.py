"""What `predict --engine ray` decides without Ray: addresses, room for actors, and errors as plain data."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from calling import call
from predicting import save_checkpoint, write

from ssaseg.cli import cluster
from ssaseg.cli.cluster import Node, Share, parse_engine, require_ray, share_out
from ssaseg.cli.errors import CommandError
from ssaseg.cli.prediction import ray_engine
from ssaseg.cli.results.manifest import Entry
from ssaseg.datasets import DataError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ray", "local"),
        ("ray://auto", "auto"),
        ("ray://head", "head:6379"),
        ("ray://10.0.0.1:7000", "10.0.0.1:7000"),
        ("ray://[::1]:7000", "[::1]:7000"),
    ],
)
def test_addresses(text: str, address: str) -> None:
    assert parse_engine(text) == address


@pytest.mark.parametrize(
    "text", ["", "Ray", "ray:", "ray://", "dask", "http://head", "ray://head:x", "ray://head:0", "ray://head:99999",
             "ray://head/a", "ray://me@head", "ray://:6379", "ray://he ad", "ray://ray://head"],
)  # fmt: skip
def test_wrong_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="expected ray "):
        parse_engine(text)


@contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """An address that takes connections and sends this, or nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                if answer is not None:
                    connection.sendall(answer)
                with suppress(ConnectionError):
                    while connection.recv(100):  # until the other side closes
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join(5)


@pytest.mark.parametrize(
    ("answer", "words"), [(None, "no answer"), (b"HTTP/1.1 400 Bad Request\r\n\r\n", "answers, but is not Ray")]
)
def test_what_is_not_ray(monkeypatch: pytest.MonkeyPatch, answer: bytes | None, words: str) -> None:
    monkeypatch.setattr(cluster, "NEEDS", ())
    monkeypatch.setattr(cluster, "WAIT", 0.2)
    with listening(answer) as address, pytest.raises(CommandError, match=f"--engine ray://{address}: .*{words}"):
        require_ray(address)


def test_what_speaks_as_ray_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "NEEDS", ())
    with listening(bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))) as address:
        assert require_ray(address) == address
        monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
        with pytest.raises(CommandError, match="RAY_ADDRESS=ray://head:10001 in the environment\nexpected HOST:PORT"):
            require_ray("auto")


def test_an_address_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, before the network is read, and nothing is written."""
    monkeypatch.setattr(cluster, "NEEDS", ())
    (tmp_path / "m.safetensors").write_bytes(b"not read")
    write(tmp_path / "in/a.png")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    words = ("predict", tmp_path / "m.safetensors", tmp_path / "in", "--out", tmp_path / "out")
    result = call(*words, "--engine", f"ray://127.0.0.1:{port}")
    assert result.exit_code == 2
    assert f"--engine ray://127.0.0.1:{port}: cannot be reached (Connection refused)" in result.output
    assert result.output.count("\n") <= 3
    assert not (tmp_path / "out").exists()


def test_the_extra_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "NEEDS", ("no_such_package",))
    with pytest.raises(CommandError, match=r"needs no_such_package, not installed\npip install 'ssaseg\[ray\]'"):
        require_ray("local")


def test_options_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "NEEDS", ())
    words = ("predict", save_checkpoint(tmp_path / "m.safetensors"), write(tmp_path / "a.png"), "--out", tmp_path / "o")
    assert "--actors 2: only with --engine ray" in call(*words, "--actors", 2).output
    assert "--timings: times the stages of one process" in call(*words, "--engine", "ray", "--timings").output
    assert call(*words, "--engine", "ray", "--actors", 0).exit_code == 2


@pytest.mark.parametrize(
    ("nodes", "wanted", "on_gpu", "share"),
    [
        ([Node(2, 0)], None, False, Share(1, 2, 0)),
        ([Node(8, 0), Node(16, 0)], None, False, Share(6, 4, 0)),
        ([Node(6, 0)], None, False, Share(1, 4, 0)),
        ([Node(2, 0), Node(16, 0)], None, False, Share(9, 2, 0)),  # no node is left out
        ([Node(0, 0), Node(16, 0)], None, False, Share(4, 4, 0)),
        ([Node(8, 0)], 2, False, Share(2, 4, 0)),
        ([Node(8, 0)], 3, False, Share(3, 2, 0)),
        ([Node(8, 0)], 8, False, Share(8, 1, 0)),
        ([Node(4, 0), Node(4, 0)], 1, False, Share(1, 4, 0)),  # an actor is on one node
        ([Node(64, 8)], None, True, Share(8, 8, 1)),
        ([Node(8, 4), Node(8, 4)], None, True, Share(8, 2, 1)),
        ([Node(64, 8)], 2, True, Share(2, 8, 1)),
        ([Node(1, 2)], None, True, Share(2, 0, 1)),
    ],
)
def test_room_for_actors(nodes: list[Node], wanted: int | None, on_gpu: bool, share: Share) -> None:
    assert share_out(nodes, wanted, on_gpu) == share


@pytest.mark.parametrize(
    ("nodes", "wanted", "on_gpu", "words"),
    [
        ([Node(4, 0)], 5, False, "--actors 5: the cluster has 4 cores\nuse at most --actors 4"),
        ([Node(64, 2)], 3, True, "--actors 3: the cluster has 2 GPUs\nuse at most --actors 2"),
        ([Node(64, 0)], None, True, "--engine ray: the cluster has no GPUs"),
        ([], None, False, "--engine ray: the cluster has no cores"),
    ],
)
def test_no_room_for_actors(nodes: list[Node], wanted: int | None, on_gpu: bool, words: str) -> None:
    with pytest.raises(CommandError, match=words):
        share_out(nodes, wanted, on_gpu)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (CommandError("two\nlines", 3), CommandError, "two\nlines"),
        (DataError("of the checkpoint"), CommandError, "of the checkpoint"),
        (MemoryError(), CommandError, "not enough memory"),
        (OSError(28, "No space left on device", "/x"), OSError, "No space left on device"),
        (FloatingPointError("nan in a.png"), FloatingPointError, "nan in a.png"),
        (KeyError("a bug"), RuntimeError, "KeyError: 'a bug'"),
    ],
)
def test_errors_as_plain_data(error: Exception, kind: type[Exception], words: str) -> None:
    made = ray_engine.unpacked(ray_engine.pack_error(error))
    assert type(made) is kind
    assert words in str(made)
    assert getattr(made, "exit_code", 0) == (3 if words == "two\nlines" else 2 if kind is CommandError else 0)
    if isinstance(made, OSError):
        assert (made.errno, made.filename) == (28, "/x")


class NoRay:
    """What `Run` has of Ray until it starts a round."""


def run_of_two(tmp_path: Path, skipped: list[str]) -> ray_engine.Run:
    """A run whose labeller only notes what is skipped."""

    class Labeller:
        def skip(self, source: ray_engine.Source, skip: ray_engine.Skip) -> None:
            skipped.append(f"{source.relative}: {skip.reason}")

    run = object.__new__(ray_engine.Run)
    run.__dict__.update(labeller=Labeller(), share=Share(2, 1, 0), stop=ray_engine.StopSignal(), handled=set(), done=0)
    return run


@pytest.mark.parametrize("lost", [{"3"}, {"0", "1"}, set(map(str, range(40)))])
def test_images_that_end_their_actors_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: set[str]
) -> None:
    """Blocks with one of `lost` are lost; the rounds end, and these images alone are errors."""
    skipped: list[str] = []
    run = run_of_two(tmp_path, skipped)
    rounds = []

    def one_round(left, size, actors, alone, advance):  # type: ignore[no-untyped-def]
        rounds.append((len(left), size))
        missing = 0
        for start in range(0, len(left), size):
            names = {source.relative for source in left[start : start + size]}
            if names & lost:
                missing += 1
                if missing > ray_engine.MOST_LOST and not alone:
                    return RuntimeError("an actor died")
            else:
                run.handled |= names
        return None

    monkeypatch.setattr(run, "round", one_round, raising=False)
    run.label([ray_engine.Source(f"/in/{index}", str(index), str(index)) for index in range(400)])
    assert {line.partition(":")[0] for line in skipped} == lost
    assert len(run.handled) == 400 - len(lost)
    assert len(rounds) < 8
    assert rounds[-1][1] == 1


def test_only_deaths_end_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of_two(tmp_path, [])
    monkeypatch.setattr(run, "round", lambda *given: RuntimeError("The actor\ndied"), raising=False)
    with pytest.raises(CommandError, match="0 images are done, then actors only died: The actor died\n"):
        run.label([ray_engine.Source("/in/a", "a", "a")])


def test_an_image_that_a_node_does_not_see(tmp_path: Path) -> None:
    skipped: list[str] = []
    run = run_of_two(tmp_path, skipped)
    run.engines = set()
    source = ray_engine.Source(str(write(tmp_path / "a.png")), "a.png", "a")
    reply = {
        "what": "torch",
        "node": "n7",
        "lines": [[list(Entry("a.png", (), None, 0.0, "No such file or directory")), [], {}]],
    }
    with pytest.raises(CommandError, match=r"a.png: n7 does not see this image\nexpected each INPUT on a disk"):
        run.take(reply, {"a.png": source})
    (tmp_path / "a.png").unlink()  # for this process too: as without Ray
    run.take(reply, {"a.png": source})
    assert skipped == ["a.png: No such file or directory"]
