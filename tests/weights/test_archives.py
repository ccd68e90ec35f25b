"""The archives of torch.save, changed: no changed byte is taken for a weight, no archive costs more than its size."""

import io
import os
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pickled as p
import pytest
import torch
from pickled import refusal

from ssaseg.cli.errors import CommandError
from ssaseg.cli.weights import torch_files
from ssaseg.cli.weights.foreign import read_weights
from ssaseg.models import CheckpointError

pytestmark = pytest.mark.filterwarnings("error")
KEY = "backbone.x"


def saved(path: Path, zipped: bool = True) -> bytes:
    torch.save(
        {"state_dict": {KEY: torch.arange(50.0), "backbone.y": torch.ones(3)}, "epoch": 3},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    return path.read_bytes()


def test_no_changed_byte_of_an_archive_goes_unseen(tmp_path: Path) -> None:
    """One bit of every fourth byte: refused, or of no meaning, such as an attribute of a record."""
    path = tmp_path / "changed.pth"
    content = saved(path)
    expected = read_weights(path).tensors
    draw = random.Random(0)
    silent = []
    for at in range(draw.randrange(4), len(content), 4):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :])
        try:
            found = read_weights(path)
        except (CommandError, OSError):
            continue
        silent.append(at)
        assert found.tensors.keys() == expected.keys(), at
        assert all(torch.equal(found.tensors[key], value) for key, value in expected.items()), at
    directory = content.index(b"PK\x01\x02")
    assert all(at > directory for at in silent)
    assert len(silent) < 8, "a bit of each record's internal attributes, and the version of the archive's maker"


def test_a_checksum_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "changed.pth"
    content = bytearray(saved(path))
    content[content.index(torch.arange(50.0).numpy().tobytes()) + 9] ^= 64
    path.write_bytes(content)
    assert "changed/data/0 in it has a wrong checksum" in refusal(path)


def rewritten(path: Path, change: Callable[[zipfile.ZipFile, dict[str, bytes]], None]) -> Path:
    """An archive of torch.save, written again by `change` from its records."""
    saved(path)
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        change(file, records)
    return path


def test_archives_that_torch_save_does_not_write(tmp_path: Path) -> None:
    def twice(file: zipfile.ZipFile, records: dict[str, bytes]) -> None:
        for name, content in [*records.items(), next(iter(records.items()))]:
            file.NameToInfo.clear()  # or it would warn
            file.writestr(name, content)

    def script(file: zipfile.ZipFile, records: dict[str, bytes]) -> None:
        for name, content in {**records, "odd/constants.pkl": b""}.items():
            file.writestr(name, content)

    def other_order(file: zipfile.ZipFile, records: dict[str, bytes]) -> None:
        for name, content in {**records, "odd/byteorder": b"big"}.items():
            file.writestr(name, content)

    def comment(file: zipfile.ZipFile, records: dict[str, bytes]) -> None:
        file.comment = b"x"

    def nothing(file: zipfile.ZipFile, records: dict[str, bytes]) -> None:
        file.writestr("odd/version", b"3")

    path = tmp_path / "odd.pth"
    for change, message in (
        (twice, "twice"),
        (script, "TorchScript"),
        (other_order, "another byte order"),
        (comment, "truncated"),
        (nothing, "without data.pkl"),
    ):
        assert message in refusal(rewritten(path, change))


def test_overlapping_records_and_large_directories(tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    content = saved(path)
    # Every entry of the directory says that its record starts at 0.
    entry, moved = content.index(b"PK\x01\x02"), bytearray(content)
    while content[entry : entry + 4] == b"PK\x01\x02":
        moved[entry + 42 : entry + 46] = bytes(4)
        entry += 46 + sum(struct.unpack("<3H", content[entry + 28 : entry + 34]))
    path.write_bytes(moved)
    refusal(path)
    end = bytearray(content)
    end[-10:-6] = struct.pack("<L", 2**31)
    path.write_bytes(end)
    assert "directory has 2147483648 bytes" in refusal(path)


def test_a_tar_archive(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "old.tar", "w") as file:
        info = tarfile.TarInfo("storages")
        info.size = 3
        file.addfile(info, io.BytesIO(b"abc"))
    (tmp_path / "old.tar").rename(tmp_path / "old.pth.tar")
    assert "a tar archive" in refusal(tmp_path / "old.pth.tar")


def test_what_is_not_a_regular_file(tmp_path: Path) -> None:
    """It is not waited for, and no device is read."""
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "null.pth").symlink_to("/dev/zero")
    for name in ("pipe.pth", "null.pth"):
        with pytest.raises(OSError, match="not a regular file"):
            read_weights(tmp_path / name)
    with (tmp_path / "sparse.pth").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="larger than 16,384 MiB"):
        read_weights(tmp_path / "sparse.pth")


def test_storages_of_a_legacy_file(tmp_path: Path) -> None:
    """Their lengths are in the file twice."""
    path = tmp_path / "legacy.pth"
    content = saved(path, zipped=False)
    assert read_weights(path).tensors[KEY].sum() == torch.arange(50.0).sum()
    at = content.index(struct.pack("<q", 50) + torch.arange(50.0).numpy().tobytes())
    for length in (49, 51, 2**60, -1):
        path.write_bytes(content[:at] + struct.pack("<q", length) + content[at + 8 :])
        assert "another length" in refusal(path)
    for wrong in (content[:-1], content + b"\0"):
        path.write_bytes(wrong)
        refusal(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_random_changes_end_in_an_error_or_a_result(tmp_path: Path, zipped: bool) -> None:
    """Changed pickles whose checksums are right: 600 changes of opcodes and arguments."""
    path = tmp_path / "fuzz.pth"
    torch.save({"state_dict": {KEY: torch.ones(3), "backbone.n": np.ones((2, 2), "f4")}, "a": [1, (2.0, None)]}, path)
    with zipfile.ZipFile(path) as file:
        body = file.read("fuzz/data.pkl")
    draw = random.Random(1)
    for _ in range(300):
        changed = bytearray(body)
        for _ in range(draw.randrange(1, 4)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        if zipped:
            p.archive(path, bytes(changed[2:-1]), {"0": bytes(12)})
        else:
            path.write_bytes(changed)
        try:
            found = read_weights(path)
        except (CommandError, CheckpointError):
            continue
        assert all(value.numel() < 2000 for value in found.tensors.values())


def test_the_largest_network_and_its_state_can_be_read() -> None:
    weights = 4 * 365_983_200  # bytes of upernet_vit_adapter_l with ssa
    assert weights < torch_files.LARGEST_WEIGHTS
    assert 3 * weights < torch_files.LARGEST_FILE, "with Adam's moments"
