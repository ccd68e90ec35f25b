"""`predict` with inputs and outputs that are no local files: tars, addresses, lists."""

import errno
import gzip
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import pytest
from calling import call
from fsspec.implementations.memory import MemoryFileSystem
from predicting import files, picture, save_checkpoint, write
from serving import send, serving
from tars import members_of, tar_of, write_tar

from ssaseg.cli.errors import CommandError
from ssaseg.cli.prediction import stores
from ssaseg.cli.prediction.inputs import AHEAD, Stream, find_inputs
from ssaseg.cli.prediction.predict import run_predict
from ssaseg.cli.prediction.sources import LeftOut, Source
from ssaseg.cli.prediction.stores import Objects, Tars, store_of
from ssaseg.cli.results.manifest import Entry
from ssaseg.cli.signals import StopSignal
from ssaseg.cli.tiling.options import Tiles
from ssaseg.datasets import DataError

pytestmark = pytest.mark.usefixtures("one_thread", "tiny")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny: None) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors", network="seaformer_y")


def jpeg(seed: int) -> bytes:
    return cv2.imencode(".jpg", picture(seed=seed))[1].tobytes()


PHOTOS = {f"{name}.jpg": jpeg(ord(name)) for name in "abc"}


def label(checkpoint: Path, inputs: list[Any], out: Any, *save: str, resume: bool = False, **more: Any) -> int:
    return run_predict(checkpoint, [str(each) for each in inputs], out, save or ("index",), resume, "cpu", **more)


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of PHOTOS in a local folder, by the name of the image without suffix."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "in").mkdir()
    for name, content in PHOTOS.items():
        (folder / "in" / name).write_bytes(content)
    assert label(checkpoint, [folder / "in"], folder / "out") == 0
    return {path.stem: path.read_bytes() for path in (folder / "out/index").iterdir()}


def below(folder: Path) -> list[str]:
    return [name for name in files(folder) if not name.startswith("manifest")]


# ---- tars in -----------------------------------------------------------------------------------------------------
def test_tars_are_labelled_as_their_files_would_be(
    checkpoint: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = [("s/a.jpg", PHOTOS["a.jpg"]), ("s/a.cls", b"1"), ("s/a.json", b"{}"), ("s/._a.jpg", b"of macOS")]
    write_tar(tmp_path / "p-08.tar", sample)
    (tmp_path / "p-09.tar").write_bytes(gzip.compress(tar_of([("s/b.x.jpg", PHOTOS["b.jpg"])])))
    write_tar(tmp_path / "p-10.tar", [("s/c.jpg", PHOTOS["c.jpg"])])
    pattern, out = f"{tmp_path}/p-{{08..10}}.tar", tmp_path / "out"
    assert label(checkpoint, [pattern], out) == 0
    assert below(out) == [f"index/p-{name}.png" for name in ("08/s/a", "09/s/b", "10/s/c")]
    for name, content in zip("abc", (path.read_bytes() for path in sorted(out.rglob("*.png"))), strict=True):
        assert content == expected[name]
    told = capsys.readouterr()
    assert "labelled 3 of 3 images" in told.out
    assert "2 files of other types are left out: 1 .cls, 1 .json" in told.out
    entries = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [entry["file"] for entry in entries] == ["p-08/s/a.jpg", "p-09/s/b.x.jpg", "p-10/s/c.jpg"]

    (out / "index/p-09/s/b.png").write_bytes(b"?")
    assert label(checkpoint, [tmp_path / "p-*.tar"], out, resume=True) == 0
    assert "labelled 1 of 3 images" in capsys.readouterr().out
    write_tar(tmp_path / "p-08.tar", [("s/a.jpg", PHOTOS["b.jpg"])])
    assert label(checkpoint, [tmp_path / "p-08.tar"], out, resume=True) == 0
    assert "labelled 1 of 1 images" in capsys.readouterr().out


def test_bad_members_and_tars_are_reported_and_the_others_are_labelled(
    checkpoint: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = {"type": b"2", "linkname": "/etc/passwd"}
    members = [
        ("../out.jpg", b"x"), ("/abs.jpg", b"x"), ("link.jpg", link), ("a.jpg", PHOTOS["a.jpg"]), ("bad.jpg", b"x"),
        ("a.png", PHOTOS["b.jpg"]), ("\x1b[31m.jpg", b"x"), ("z.jpg", PHOTOS["c.jpg"]),
    ]  # fmt: skip
    write_tar(tmp_path / "x.tar", members)
    whole = tar_of([("b.jpg", PHOTOS["b.jpg"]), ("c.jpg", PHOTOS["c.jpg"])])
    (tmp_path / "y.tar").write_bytes(whole[:900])
    (tmp_path / "z.tar").write_bytes(b"no tar")
    os.mkfifo(tmp_path / "f.tar")
    inputs = [tmp_path / f"{name}.tar" for name in "fxyz"]
    assert label(checkpoint, inputs, tmp_path / "out") == 1
    told = capsys.readouterr()
    assert below(tmp_path / "out") == ["index/x/a.png", "index/x/z.png"]
    assert (tmp_path / "out/index/x/a.png").read_bytes() == expected["a"]
    for text in (
        "f.tar: not a regular file, but a FIFO",
        "x.tar/../out.jpg, ",
        "its name leads out of the tar",
        "x.tar/link.jpg: not a regular file, but a link",
        "x.tar/bad.jpg",
        "x.tar/a.png: an earlier image has the same name of results, x/a; `predict --keep-suffix`",
        "x.tar/\\x1b[31m.jpg",
        "y.tar: ",
        "z.tar: not a tar",
    ):
        assert text in told.err, text
    assert "labelled 2 of 11 images" in told.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.tar", "out", "x.tar", "y.tar", "z.tar"]
    assert label(checkpoint, [tmp_path / "x.tar"], tmp_path / "kept", keep_suffix=True) == 1
    assert below(tmp_path / "kept") == [f"index/x/{name}.png" for name in ("a.jpg", "a.png", "z.jpg")]


def test_a_stream_is_read_only_as_far_as_it_is_needed(tmp_path: Path) -> None:
    read: list[int] = []

    def images() -> Iterator[Source]:
        for number in range(3 * AHEAD):
            read.append(number)
            yield Source(f"{number}", f"{number}", f"{number}")

    stream = Stream(images())
    assert (len(read), len(stream), bool(stream)) == (AHEAD, 0, True)
    left = stream.without(lambda source: int(source.file) % 2 == 0)
    assert len(read) == 2 * AHEAD
    assert [source.file for source in left] == [str(number) for number in range(1, 3 * AHEAD, 2)]
    assert (len(stream), len(left)) == (3 * AHEAD, 3 * AHEAD // 2)
    assert not Stream(iter(()))


@pytest.mark.parametrize(
    ("inputs", "more", "why"),
    [
        (["none.tar"], {}, "none.tar: there is no such tar"),
        (["p-{0..2}.tar"], {}, "3 of 3 tars are not there, the first of them .*p-0.tar"),
        (["p-*.tar"], {}, "there is no such tar"),
        (["x.tar"], {"shard": (0, 2)}, "images in tars have no shards"),
        (["x.tar"], {"annotations": Path("x.json")}, "images in tars have no ids"),
        (["x.tar"], {"tiles": Tiles()}, "--tile: works on local files; got images in a tar"),
        (["x.tar"], {"engine": "local"}, "--engine ray: works on local files; got images in a tar"),
    ],
)
def test_what_tars_cannot_do(checkpoint: Path, tmp_path: Path, inputs: list[str], more: dict, why: str) -> None:
    from ssaseg.cli.sharding import Shard

    write_tar(tmp_path / "x.tar", [("a.jpg", PHOTOS["a.jpg"])])
    more = {key: Shard(*value) if key == "shard" else value for key, value in more.items()}
    with pytest.raises(CommandError, match=why):
        label(checkpoint, [tmp_path / each for each in inputs], tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [{"tiles": Tiles()}, {"engine": "local"}])
def test_tiles_and_actors_work_on_local_files(
    checkpoint: Path, memory: MemoryFileSystem, tmp_path: Path, more: dict[str, Any]
) -> None:
    memory.pipe_file("/photos/a.jpg", PHOTOS["a.jpg"])
    write(tmp_path / "in/a.png")
    with pytest.raises(CommandError, match=r"works on local files; got memory://.*photos/a\.jpg"):
        label(checkpoint, ["memory://photos"], tmp_path / "out", **more)
    with pytest.raises(CommandError, match=r"works on local files; got --out memory://labels"):
        label(checkpoint, [tmp_path / "in"], "memory://labels", **more)


# ---- tars out ----------------------------------------------------------------------------------------------------
def test_samples_in_tars(
    checkpoint: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(stores, "SAMPLES", 2)
    write_tar(tmp_path / "p.tar", [("s/a.jpg", PHOTOS["a.jpg"]), ("s/b.jpg", PHOTOS["b.jpg"]), ("bad.jpg", b"x")])
    write(tmp_path / "in/d/c.1.jpg")
    (tmp_path / "in/d/c.1.jpg").write_bytes(PHOTOS["c.jpg"])
    out, kinds = f"{tmp_path}/res/out-%03d.tar", ("index", "overlay", "shares", "rle")
    inputs = [tmp_path / "in", tmp_path / "p.tar"]
    assert label(checkpoint, inputs, out, *kinds) == 1
    assert sorted(path.name for path in (tmp_path / "res").iterdir()) == [
        *("out-000.tar", "out-001.tar", "out.classes.json")
    ]
    first, second = (members_of((tmp_path / f"res/out-00{number}.tar").read_bytes()) for number in (0, 1))
    endings = ("index.png", "overlay.jpg", "shares.json", "rle.json", "json")
    assert [*first] == [f"{key}.{ending}" for key in ("d/c_1", "s/a") for ending in endings]
    assert [*second] == [f"s/b.{ending}" for ending in endings]
    assert [first["d/c_1.index.png"], first["s/a.index.png"], second["s/b.index.png"]] == [
        *(expected["c"], expected["a"], expected["b"])
    ]
    entry = json.loads(second["s/b.json"])
    assert (entry["file"], entry["size"], entry["error"]) == ("p/s/b.jpg", [56, 40], None)
    assert entry["outputs"] == [f"s/b.{ending}" for ending in endings[:-1]]
    assert entry["bytes"] == [len(second[name]) for name in entry["outputs"]]
    assert json.loads(second["s/b.shares.json"])[0]["image"] == "p/s/b.jpg"
    capsys.readouterr()

    with pytest.raises(CommandError, match=r"out-000.tar: exists already\n--resume"):
        label(checkpoint, inputs, out, *kinds)
    (tmp_path / "in/e.jpg").write_bytes(PHOTOS["a.jpg"])
    assert label(checkpoint, inputs, out, *kinds, resume=True) == 1
    assert "labelled 1 of 5 images" in capsys.readouterr().out
    assert [*members_of((tmp_path / "res/out-002.tar").read_bytes())] == [f"e.{ending}" for ending in endings]
    assert label(checkpoint, inputs[:1], out, *kinds, resume=True) == 0
    assert not (tmp_path / "res/out-003.tar").exists()  # nothing was left to do


def test_images_that_where_leaves_out_are_in_no_tar(checkpoint: Path, tmp_path: Path) -> None:
    write(tmp_path / "in/a.png")
    for where, names in (("sky>=0", ["a.index.png", "a.json"]), ("sky<0", [])):
        out = tmp_path / f"{len(names)}.tar"
        assert label(checkpoint, [tmp_path / "in"], str(out), where=where) == 0
        assert [*members_of(out.read_bytes())] == names if names else not out.exists()


def sample(store: Tars, name: str) -> None:
    source = Source(f"{name}.jpg", f"{name}.jpg", name)
    result = store.write("index", source, b"png", "origin")
    store.add(Entry(source.relative, [store.output_of("index", source)], (1, 1), 0.0, None), [result])


@pytest.mark.parametrize("how", ["stopped", "error", "interrupted"])
def test_a_tar_has_its_name_only_when_it_is_complete(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a number in its name, what is done stays, except after a second Ctrl-C."""
    kept = {"stopped": True, "error": True, "interrupted": False}[how]
    for name, there in (("one.tar", False), ("n-%d.tar", kept)):
        stop = StopSignal()
        try:
            with store_of(f"{tmp_path}/{name}", False, stop) as store:
                assert isinstance(store, Tars)
                sample(store, "a")
                assert not list(tmp_path.glob("*.tar"))
                stop.number = signal.SIGINT if how == "stopped" else None
                if how != "stopped":
                    raise OSError("full") if how == "error" else KeyboardInterrupt
        except (OSError, KeyboardInterrupt):
            pass
        names = [path.name for path in tmp_path.iterdir()]
        assert names == (["n-0.tar"] if there else [])
    assert ("one.tar: not written" in capsys.readouterr().err) is (how == "stopped")


def test_a_full_disk_keeps_the_samples_before_it(tmp_path: Path) -> None:
    def fill(store: Tars) -> None:
        with store:
            sample(store, "a")
            file, size = store.file, store.bytes
            assert file is not None

            def write_some(content: Any) -> int:
                if file.tell() > size + 100:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return file.write(content[:77])

            kept = {name: getattr(file, name) for name in ("tell", "seek", "close", "fileno", "closed")}
            store.file = SimpleNamespace(**kept, write=write_some)  # type: ignore[assignment]
            sample(store, "b")

    store = store_of(f"{tmp_path}/n-%d.tar", False, StopSignal())
    assert isinstance(store, Tars)
    with pytest.raises(OSError, match="No space left on device"):
        fill(store)
    assert [path.name for path in tmp_path.iterdir()] == ["n-0.tar"]
    content = (tmp_path / "n-0.tar").read_bytes()
    assert [*members_of(content)] == ["a.index.png", "a.json"]
    assert (len(content) % 512, content[-1024:]) == (0, bytes(1024))


def test_two_images_with_one_key(tmp_path: Path) -> None:
    with store_of(f"{tmp_path}/o.tar", False, StopSignal()) as store:
        sample(store, "a.b")
        with pytest.raises(DataError, match=r"a.b.jpg has the same key, a_b"):
            sample(store, "a_b")
        store.add(Entry("a_b.jpg", (), None, 0.0, "the same key"))
    assert [*members_of((tmp_path / "o.tar").read_bytes())] == ["a_b.index.png", "a_b.json"]


@pytest.mark.parametrize(
    ("out", "resume", "why"),
    [
        ("o.tar.gz", False, "written without compression"),
        ("http://127.0.0.1:9/o.tar?sig=1", False, "http://127.0.0.1:9/o.tar: a tar cannot be written to an address"),
        ("o-%d-%d.tar", False, "at most one number"),
        ("100%.tar", False, "at most one number"),
        ("there.tar", True, "nothing can be added to a tar"),
        ("there.tar", False, "exists already"),
    ],
)
def test_tars_that_cannot_be_written(checkpoint: Path, tmp_path: Path, out: str, resume: bool, why: str) -> None:
    write(tmp_path / "in/a.jpg")
    (tmp_path / "there.tar").write_bytes(b"mine")
    out = out if "://" in out else f"{tmp_path}/{out}"
    result = call("predict", checkpoint, tmp_path / "in", "--out", out, *["--resume"] * resume)
    assert result.exit_code == 2
    assert why in result.output
    assert (tmp_path / "there.tar").read_bytes() == b"mine"


# ---- addresses ---------------------------------------------------------------------------------------------------
def test_from_objects_to_objects(
    checkpoint: Path, expected: dict[str, bytes], memory: MemoryFileSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in PHOTOS.items():
        memory.pipe_file(f"/b/photos/x/{name}", content)
    memory.pipe_file("/b/photos/notes.txt", b"x")
    out, kinds = "memory://b/photos/labels", ("index", "shares")

    def labelled(*inputs: str, resume: bool = True, model: Path = checkpoint) -> str:
        label(model, [*inputs] or ["memory://b/photos"], out, *kinds, resume=resume)
        return capsys.readouterr().out.partition(" images")[0]

    assert labelled(resume=False) == "labelled 3 of 3"
    root = "/b/photos/labels"
    made = {path.removeprefix(f"{root}/") for path in memory.find(root)}
    (part,) = (name for name in made if name.startswith("manifest/"))
    endings = {"index": "png", "shares": "json"}
    results = {f"{kind}/x/{name}.{ending}" for name in "abc" for kind, ending in endings.items()}
    assert made - {part} == {"classes.json", *results}
    for name in "abc":
        assert memory.cat_file(f"{root}/index/x/{name}.png") == expected[name]
    lines = [json.loads(line) for line in memory.cat_file(f"{root}/{part}").splitlines()]
    assert {line["file"]: line["error"] for line in lines} == {f"x/{name}": None for name in PHOTOS}

    assert labelled() == "labelled 0 of 3"  # also: results below the input are no images
    memory.rm_file(f"{root}/index/x/a.png")
    memory.pipe_file(f"{root}/shares/x/b.json", b"changed")
    assert labelled() == "labelled 2 of 3"
    memory.pipe_file("/b/photos/x/c.jpg", PHOTOS["a.jpg"])
    assert labelled() == "labelled 1 of 3"
    other = save_checkpoint(checkpoint.with_name("other.safetensors"), "linear", network="seaformer_y")
    assert labelled(model=other) == "labelled 3 of 3"
    assert labelled(model=other) == "labelled 0 of 3"
    assert labelled("memory://b/photos/x/a.jpg", resume=False) == "labelled 1 of 1"
    assert "index/a.png" in {path.removeprefix(f"{root}/") for path in memory.find(root)}
    with pytest.raises(CommandError, match=r"memory://b/photos/\*.txt: no image found; 1 file of another type"):
        labelled("memory://b/photos/*.txt")


def test_from_a_web_server_and_tars_at_addresses_to_a_folder(
    checkpoint: Path, expected: dict[str, bytes], memory: MemoryFileSystem, tmp_path: Path
) -> None:
    memory.pipe_file("/b/t-1.tar", tar_of([("a.jpg", PHOTOS["a.jpg"])]))
    content = tar_of([("b.jpg", PHOTOS["b.jpg"])])
    with serving(lambda handler: send(handler, content if ".tar" in handler.path else PHOTOS["c.jpg"])) as server:
        web = [f"{server.address}/w.tar?sig=SECRET", f"{server.address}/c.jpg?sig=SECRET"]
        result = call("predict", checkpoint, "memory://b/t-{1..1}.tar", *web, "--out", f"file://{tmp_path}/out")
    assert result.exit_code == 0, result.output
    assert below(tmp_path / "out") == ["index/c.png", "index/t-1/a.png", "index/w/b.png"]
    assert [path.read_bytes() for path in sorted((tmp_path / "out").rglob("*.png"))] == [expected[k] for k in "cab"]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and b"SECRET" in path.read_bytes()]


def test_a_tar_at_an_address_out(checkpoint: Path, memory: MemoryFileSystem, tmp_path: Path) -> None:
    write(tmp_path / "in/a.jpg")
    assert label(checkpoint, [tmp_path / "in"], "memory://b/o.tar") == 0
    assert [*members_of(memory.cat_file("/b/o.tar"))] == ["a.index.png", "a.json"]
    assert memory.exists("/b/o.classes.json")
    with pytest.raises(CommandError, match=r"memory://b/o.tar: exists already"):
        label(checkpoint, [tmp_path / "in"], "memory://b/o.tar")


def test_objects_that_fail_are_skipped(
    checkpoint: Path, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in PHOTOS.items():
        memory.pipe_file(f"/b/in/{name}", content)
    real_open, real_pipe = MemoryFileSystem.open, MemoryFileSystem.pipe_file

    def open_some(self: MemoryFileSystem, path: str, *rest: Any, **more: Any) -> Any:
        if path.endswith("in/a.jpg"):
            raise OSError("the connection was reset")
        return real_open(self, path, *rest, **more)

    def pipe_some(self: MemoryFileSystem, path: str, *rest: Any, **more: Any) -> Any:
        if path.endswith("index/b.png"):
            raise RuntimeError("too many requests")
        return real_pipe(self, path, *rest, **more)

    monkeypatch.setattr(MemoryFileSystem, "open", open_some)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_some)
    assert label(checkpoint, ["memory://b/in"], "memory://b/out") == 1
    told = capsys.readouterr()
    assert "labelled 1 of 3 images" in told.out
    assert "/b/in/a.jpg: the connection was reset; look at the address" in told.err
    assert "RuntimeError: too many requests" in told.err
    assert memory.exists("/b/out/index/c.png")
    (part,) = memory.glob("/b/out/manifest/*")
    errors = {json.loads(line)["file"]: json.loads(line)["error"] for line in memory.cat_file(part).splitlines()}
    assert {name for name, error in errors.items() if error} == {"a.jpg", "b.jpg"}


def test_a_store_that_is_out_of_reach_ends_the_command(memory: MemoryFileSystem, monkeypatch: Any) -> None:
    store = store_of("memory://b/out", False, StopSignal())
    assert isinstance(store, Objects)

    def fail(*_: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", fail)
    source = Source("a.jpg", "a.jpg", "a")
    for _ in range(stores.FAILURES - 1):
        with pytest.raises(DataError, match="no route"):
            store.write("index", source, b"", "")
    with pytest.raises(CommandError, match="10th write in a row that failed"):
        store.write("index", source, b"", "")


def test_a_store_that_cannot_be_written_is_seen_before_the_work(
    checkpoint: Path, tmp_path: Path, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in/a.jpg")
    for out, why in (
        ("s9://k:SECRET@b/x", "is no kind of address"),
        ("http://127.0.0.1:9/x?sig=SECRET", "127.0.0.1:9/x"),
    ):
        result = call("predict", checkpoint, tmp_path / "in", "--out", out)
        assert result.exit_code == 2
        assert why in result.output
        assert "SECRET" not in result.output
    memory.pipe_file("/b/x/classes.json", b"{}")
    with pytest.raises(CommandError, match="not written by `ssaseg predict`"):
        label(checkpoint, [tmp_path / "in"], "memory://b/x")
    assert memory.cat_file("/b/x/classes.json") == b"{}"


# ---- lists -------------------------------------------------------------------------------------------------------
def test_a_list_of_files_addresses_and_tars(
    checkpoint: Path,
    expected: dict[str, bytes],
    memory: MemoryFileSystem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = tmp_path / "here"
    for name in ("here/p/a.jpg", "up/a.jpg"):
        write(tmp_path / name).write_bytes(PHOTOS["a.jpg"])
    memory.pipe_file("/b/b.jpg", PHOTOS["b.jpg"])
    write_tar(tmp_path / "t.tar", [("c.jpg", PHOTOS["c.jpg"])])
    monkeypatch.chdir(here)
    lines = ["p/a.jpg", "./p//a.jpg", "", "../up/a.jpg", "none.jpg", "p", "memory://b/b.jpg", f"{tmp_path}/t.tar",
             "s9://b/x.jpg", "../../../../../../../../../../etc/none.jpg"]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("\r\n".join(lines).encode())))
    assert label(checkpoint, [], Path("out"), listing="-") == 1
    up = str(tmp_path).lstrip("/")
    assert below(here / "out") == sorted(f"index/{name}.png" for name in ("p/a", f"{up}/up/a", "b/b", "t/c"))
    assert (here / f"out/index/{up}/up/a.png").read_bytes() == expected["a"]
    failed = [json.loads(line) for line in (here / "out/manifest.jsonl").read_text().splitlines()]
    errors = {entry["file"]: entry["error"] for entry in failed if entry["error"]}
    assert errors.keys() == {"none.jpg", "p", "b/x.jpg", "etc/none.jpg"}
    assert errors["none.jpg"] == "No such file or directory"
    assert "is no kind of address" in errors["b/x.jpg"]


def test_equal_names_in_a_list_and_no_input_at_all(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png"):
        write(tmp_path / name)
    (tmp_path / "list").write_text(f"{tmp_path}/a.jpg\n{tmp_path}/a.png\n")
    words = ("predict", checkpoint, "--out", tmp_path / "out", "--device", "cpu")
    result = call(*words, "--list", tmp_path / "list")
    assert result.exit_code == 2
    assert "their results would have the same name" in result.output
    result = call(*words)
    assert result.exit_code == 2
    assert "Missing argument 'INPUT...'" in result.output
    others = LeftOut()
    assert len(find_inputs([], str(tmp_path / "list"), tmp_path / "out", others, True)) == 2
