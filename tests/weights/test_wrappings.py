"""Checkpoints as training scripts wrap them: under any key, with prefixes, averaged, as NumPy arrays, safetensors."""

import argparse
import io
import itertools
import pickle
import zipfile
from collections import deque
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import numpy as np
import pickled as p
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from ssaseg.cli.errors import CommandError
from ssaseg.cli.main import cli
from ssaseg.cli.weights.classes import own_classes
from ssaseg.cli.weights.foreign import read_weights
from ssaseg.cli.weights.pretrained import load_pretrained
from ssaseg.models import build_model, load_model
from ssaseg.models.official import official_keys

STATE = {f"backbone.{k}": torch.full((2, 3), k + 0.5) for k in range(20)} | {"decode_head.n": torch.tensor(3)}
OTHER = {key: value + 1 for key, value in STATE.items()}


def prefixed(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def many(count: int, name: str = "m") -> dict[str, Tensor]:
    return {f"{name}{k}": torch.zeros(1) for k in range(count)}


MMENGINE = {"meta": {"mmengine_version": "0.10.7"}, "message_hub": {"runtime_info": {}}}
# name → (content, where the weights are found, what is said about it)
WRAPPED: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "plain": (STATE, "top level", ()),
    "dataparallel": ({"state_dict": prefixed("module.")}, "state_dict", ("without the prefix module.",)),
    "compiled": ({"model": prefixed("_orig_mod.")}, "model", ("without the prefix _orig_mod.",)),
    "compiled ddp": (prefixed("module._orig_mod."), "top level", ("without the prefix module._orig_mod.",)),
    "lightning": (
        {"state_dict": prefixed("model."), "pytorch-lightning_version": "2.5.0", "callbacks": {"a": many(90)}},
        "state_dict",
        ("without the prefix model.",),
    ),
    "three": (prefixed("net.module.network.model."), "top level", ("without the prefix net.module.network.model.",)),
    "compiled parts": (
        {key.replace("backbone.", "backbone._orig_mod."): value for key, value in STATE.items()},
        "top level",
        ("without the prefix _orig_mod.",),
    ),
    "model_state_dict": ({"model_state_dict": STATE, "epoch": 3}, "model_state_dict", ()),
    "params": ({"params": STATE}, "params", ()),
    "nested": ({"model": {"state_dict": STATE}}, "model.state_dict", ()),
    "third level": ({"a": {"b": {"c": STATE}}}, "a.b.c", ()),
    "any key": ({"segmentor": STATE, "epoch": 3, "loss": torch.tensor(0.5)}, "segmentor", ()),
    "numpy": ({"state_dict": {key: value.numpy() for key, value in STATE.items()}}, "state_dict", ()),
    "model_ema": ({"model": OTHER, "model_ema": STATE}, "model_ema", ("the averaged weights, not those in model",)),
    "model first": ({"model_ema": STATE, "model": OTHER}, "model_ema", ("the averaged weights, not those in model",)),
    "timm": (
        {"state_dict": OTHER, "state_dict_ema": prefixed("module."), "optimizer": {"state": {0: many(99)}}},
        "state_dict_ema",
        ("the averaged weights, not those in state_dict", "without the prefix module."),
    ),
    "nested ema": (
        {"ema": {"module": STATE, "decay": torch.tensor(0.5)}, "model": OTHER},
        "ema.module",
        ("the averaged weights, not those in model",),
    ),
    "swa": (
        {"state_dict": OTHER, "swa_model": {**prefixed("module."), "n_averaged": torch.tensor(3)}},
        "swa_model",
        ("the averaged weights, not those in state_dict", "without the prefix module."),
    ),
    "basicsr": ({"params_ema": STATE, "params": OTHER}, "params_ema", ("the averaged weights, not those in params",)),
    # mmengine exchanges the two when it saves: its `state_dict` is the average.
    "mmengine": (
        {**MMENGINE, "state_dict": STATE, "ema_state_dict": {**prefixed("module.", OTHER), "steps": torch.tensor(3)}},
        "state_dict",
        ("the averaged weights, not those in ema_state_dict",),
    ),
    "a few averages": ({"model": STATE, "ema": many(5)}, "model", ("not those in ema",)),
    "schema is no average": ({"schema": many(30), "state_dict": STATE}, "state_dict", ("not those in schema",)),
    "two networks": ({"student": STATE, "critic": many(12)}, "student", ("not those in critic",)),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", WRAPPED)
def test_weights_are_found(tmp_path: Path, name: str, zipped: bool) -> None:
    content, nesting, notes = WRAPPED[name]
    torch.save(content, tmp_path / "wrapped.pth", _use_new_zipfile_serialization=zipped)
    found = read_weights(tmp_path / "wrapped.pth")
    assert (found.nesting, found.notes) == (nesting, notes)
    assert found.tensors.keys() == STATE.keys()
    assert all(torch.equal(found.tensors[key], value) for key, value in STATE.items())


@pytest.mark.parametrize("prefix", ["module.", "model._orig_mod.", ""])
def test_safetensors_with_prefixes(tmp_path: Path, prefix: str) -> None:
    save_file(prefixed(prefix), tmp_path / "official.safetensors", {"format": "pt"})
    found = read_weights(tmp_path / "official.safetensors")
    assert found.notes == ((f"without the prefix {prefix}",) if prefix else ())
    assert all(torch.equal(found.tensors[key], value) for key, value in STATE.items())


def test_a_prefix_that_some_keys_have_stays(tmp_path: Path) -> None:
    """So does one without which two keys would be equal."""
    for state in (
        {"module.backbone.a": torch.ones(1), "backbone.b": torch.ones(1)},
        {"backbone._orig_mod.a": torch.ones(1), "backbone.a": torch.zeros(1)},
    ):
        torch.save(state, tmp_path / "some.pth")
        found = read_weights(tmp_path / "some.pth")
        assert found.notes == ()
        assert len(found.tensors) == 2


def test_float8_in_safetensors(tmp_path: Path) -> None:
    value = torch.arange(-4.0, 4).to(torch.float8_e4m3fn)
    save_file({"backbone.x": value, "backbone.y": torch.ones(2)}, tmp_path / "eighth.safetensors")
    found = read_weights(tmp_path / "eighth.safetensors")
    assert torch.equal(found.tensors["backbone.x"], value.float())
    assert found.notes == ("1 of float8 read as float32",)
    save_file({"backbone.x": torch.zeros(2, dtype=torch.uint16)}, tmp_path / "odd.safetensors")
    with pytest.raises(CommandError, match=r"backbone\.x: a tensor of type U16"):
        read_weights(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    ("content", "listed"),
    [
        ({"optimizer": {"state": {0: many(2), 1: many(3)}}, "epoch": 3}, "optimizer (5 tensors), epoch (0 tensors)"),
        ({"meta": {"PALETTE": np.zeros((3, 3))}, "optim": []}, "meta (1 tensors), optim (0 tensors)"),
        ({f"k{k}": 0 for k in range(20)}, "k7 (0 tensors) and 12 more"),
        ({"a\x1b[31m\nb": {"c": 1}}, r"a\x1b[31m\x0ab (0 tensors)"),
        ({}, "no keys"),
    ],
)
def test_without_weights_the_keys_are_listed(tmp_path: Path, content: Any, listed: str) -> None:
    torch.save(content, tmp_path / "none.pth")
    with pytest.raises(CommandError) as caught:
        read_weights(tmp_path / "none.pth")
    assert "no weights in it; its keys: " in (first := str(caught.value).splitlines()[0])
    assert listed in first
    assert len(str(caught.value).splitlines()) == 2


def test_both_commands_say_what_was_taken(tmp_path: Path) -> None:
    """`convert` and `model.pretrained`, on a whole network; every weight bit for bit."""
    torch.manual_seed(0)
    model = build_model("seaformer_t", 4, "linear")
    own = model.state_dict()
    state = {theirs: own[ours] for ours, theirs in official_keys(model).items()}
    moved = {key: value + 1 for key, value in state.items()}
    torch.save({"model": moved, "model_ema": prefixed("module._orig_mod.", state)}, tmp_path / "a.pth")
    said = (
        "tensors, the averaged weights, not those in model, without the prefix module._orig_mod. (model_ema), read as"
    )
    result = CliRunner().invoke(cli, ["convert", str(tmp_path / "a.pth"), str(tmp_path / "a.safetensors")])
    assert result.exit_code == 0, result.output
    assert said in result.output
    start = build_model("seaformer_t", 4, "linear")
    assert said in str(load_pretrained(start, tmp_path / "a.pth"))
    for found in (load_model(tmp_path / "a.safetensors")[0], start):
        taken = found.state_dict()
        assert all(torch.equal(taken[key], value) for key, value in own.items())


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"CLASSES": [["a"]] * 4}, "4 without names"),
        ({"CLASSES": ["a", "b", "c", "\ud800"]}, "4 without names"),
        ({"CLASSES": ["a" * 2000] * 4}, "4 without names"),
        ({"CLASSES": 5, "PALETTE": 3}, "4 without names"),
        ({"CLASSES": ["a", "b", "c", "d"], "PALETTE": [[float("inf")] * 3] * 4}, ""),
        ({"CLASSES": ["a", "b", "c", "d"], "PALETTE": np.arange(12).reshape(4, 3)}, ""),
        ({"CLASSES": ["a", "b", "c", "d"], "PALETTE": np.full((4, 3), 300)}, ""),
    ],
)
def test_names_and_colours_of_a_hostile_file(
    tmp_path: Path, meta: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only what a header of ours may hold becomes one."""
    torch.save({"state_dict": STATE, "meta": meta}, tmp_path / "a.pth")
    metadata = own_classes(tmp_path / "a.pth", None, read_weights(tmp_path / "a.pth").meta or {}, 4)
    assert said in capsys.readouterr().out
    array = isinstance(meta.get("PALETTE"), np.ndarray) and meta["PALETTE"].max() < 256
    assert metadata.get("palette") == (meta["PALETTE"].tolist() if array else None)
    assert metadata.get("classes") == (None if said else ["a", "b", "c", "d"])


def test_a_head_with_rows_for_no_classes(tmp_path: Path) -> None:
    """Rows that cost the file nothing would cost a network of as many classes."""
    torch.save(
        {"backbone.smb1.x": torch.ones(1), "decode_head.conv_seg.weight": torch.zeros(10**8, 0)}, tmp_path / "a.pth"
    )
    words = ["convert", str(tmp_path / "a.pth"), str(tmp_path / "a.safetensors"), "--model", "seaformer_t"]
    result = CliRunner().invoke(cli, words)
    assert (result.exit_code, "has 100000000 rows" in result.output) == (2, True), result.output


def test_too_many_or_too_long_names(tmp_path: Path) -> None:
    for state in ({"backbone." + "a" * 600: torch.ones(1)}, dict.fromkeys(map(str, range(20_001)), torch.ones(1))):
        torch.save(state, tmp_path / "a.pth")
        with pytest.raises(CommandError, match="expected at most 20000"):
            read_weights(tmp_path / "a.pth")


# ---- what training scripts save beside the weights, and ordinary ways to save again --------------------------------

BESIDE = {
    "paths": argparse.Namespace(out=Path("/x"), device=torch.device("cpu"), when=datetime.now(timezone.utc)),
    "version": torch.__version__,
    "schedule": {"anneal_func": torch.optim.lr_scheduler.OneCycleLR._annealing_cos},  # of PyTorch 1.x
    "python": [deque([1, 2], maxlen=3), slice(1, 2), range(3), SimpleNamespace(a=1), {1, 2}, ..., 1 + 2j],
    "numpy": [np.float32, np.dtype("float32"), np.int64(3), np.array(["a", {}], dtype=object), np.random.get_state()],
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("protocol", [2, 4])
def test_harmless_values_beside_the_weights(tmp_path: Path, name: str, protocol: int) -> None:
    torch.save({"state_dict": STATE, "args": BESIDE[name]}, tmp_path / "a.pth", pickle_protocol=protocol)
    same(read_weights(tmp_path / "a.pth").tensors)


@pytest.mark.parametrize("package", ["pytorch_lightning.utilities.parsing.AttributeDict", "easydict.EasyDict"])
def test_mappings_of_other_libraries(tmp_path: Path, package: str) -> None:
    made = p.name(package) + b")\x81" + b"(" + p.text("state_dict") + p.mapping({"backbone.x": p.tensor()}) + b"u"
    p.archive(tmp_path / "a.pth", made)
    assert read_weights(tmp_path / "a.pth").nesting == "state_dict"


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("arrays", [True, False])
def test_a_state_dict_of_pickle(tmp_path: Path, protocol: int, arrays: bool) -> None:
    """Tensors are then files of torch.save in bytes."""
    long = torch.rand(20_000)  # in protocol 0 a line of more than 64 KiB
    state = {**STATE, "backbone.long": long}
    content = {key: value.numpy() for key, value in state.items()} if arrays else state
    (tmp_path / "a.pth").write_bytes(pickle.dumps(content, protocol))
    found = read_weights(tmp_path / "a.pth").tensors
    assert torch.equal(found.pop("backbone.long"), long)
    same(found)


def test_bytes_that_hold_no_storage(tmp_path: Path) -> None:
    good = io.BytesIO()
    torch.save(torch.arange(4.0).untyped_storage(), good, _use_new_zipfile_serialization=False)
    nested = p.call("torch.storage._load_from_bytes", p.raw(good.getvalue()))
    for content in (b"", good.getvalue()[:-1], good.getvalue() + b"x", p.pickled(nested)):
        made = p.tensor(of=p.call("torch.storage._load_from_bytes", p.raw(content)))
        (tmp_path / "a.pth").write_bytes(p.pickled(p.mapping({"backbone.x": made})))
        with pytest.raises(CommandError, match=r"is not a PyTorch checkpoint|_load_from_bytes"):
            read_weights(tmp_path / "a.pth")


def test_archives_that_were_packed_again(tmp_path: Path) -> None:
    class Stream:
        """Cannot be sought in: checksums and sizes then follow each record."""

        def __init__(self, file: BinaryIO) -> None:
            self.write, self.flush = file.write, file.flush

    path, again = tmp_path / "a.pth", tmp_path / "again.pth"
    torch.save({"state_dict": STATE}, path)
    for streamed, wide, modes in itertools.product([False, True], repeat=3):
        with (
            zipfile.ZipFile(path) as old,
            again.open("wb") as file,
            zipfile.ZipFile(cast(Any, Stream(file)) if streamed else file, "w") as new,
        ):
            for number, name in enumerate(old.namelist()):
                info = zipfile.ZipInfo(name)
                info.external_attr = (0o100600 + (number % 2 * modes and 0o44)) << 16
                with new.open(info, "w", force_zip64=wide) as record:
                    record.write(old.read(name))
        same(read_weights(again).tensors)


def test_an_archive_without_checksums(tmp_path: Path) -> None:
    from torch.serialization import set_crc32_options

    try:
        set_crc32_options(False)
        torch.save({"state_dict": STATE}, tmp_path / "a.pth")
    finally:
        set_crc32_options(True)
    same(read_weights(tmp_path / "a.pth").tensors)


def same(found: dict[str, Tensor]) -> None:
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[key].to(value.dtype), value) for key, value in STATE.items())
