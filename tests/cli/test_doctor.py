"""`ssaseg doctor`: what it prints, what it keeps to itself, and what it finds wrong."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calling import call
from networks import Flat, flat_network
from packaging.requirements import Requirement

from ssaseg.cli.diagnosis import doctor, finding, machine, networks, software
from ssaseg.cli.diagnosis.finding import Finding
from ssaseg.models import build

SECTIONS = ("software", "machine", "threads and memory", "GPU", "folders", "extras", "networks")


@pytest.fixture(autouse=True)
def _one_small_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """In place of fourteen large ones; and a user's folder of its own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "annette"))
    for name in ("TORCH_HOME", "SSASEG_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(finding.getpass, "getuser", lambda: "annette")
    (tmp_path / "home" / "annette").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with flat_network():
        family = replace(build.FAMILIES["fcn"], variants={"flat_x": None})
        monkeypatch.setattr(build, "FAMILIES", {"fcn": family})
        monkeypatch.setattr(build, "MASK_FAMILIES", {})
        yield


def found(look: Callable[[Any], Any]) -> tuple[Any, list[Finding]]:
    """What a part of the doctor returns, and what it reports."""
    findings: list[Finding] = []
    return look(findings.append), findings


def test_a_good_machine(tmp_path: Path) -> None:
    result = call("doctor", "--json", "doctor.json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert set(report) == {*SECTIONS, "findings", "well"}
    assert report["well"] is True
    assert not [each for each in report["findings"] if each["broken"]]
    assert report["software"]["torch"] == torch.__version__
    assert report["networks"]["flat_x"].startswith("ok, ")
    assert report["folders"]["current folder"].startswith(f"{tmp_path}, can be written, ")
    assert report["folders"]["weights"].startswith("~/.cache/torch/hub/checkpoints, can be made, ")
    for name in SECTIONS:
        assert f"\n{name}\n" in f"\n{result.stdout}"
    assert result.stdout.splitlines()[-1].startswith("all is well")
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert list(tmp_path.glob(".*")) == [], "what was written for a try is deleted"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("{home}/.cache/torch", "~/.cache/torch"),
        ("OSError: '{home}': no", "OSError: '~': no"),
        ("{home}-old/x", "{home}-old/x"),
        ("/scratch/annette/data", "/scratch/~/data"),
        ("/scratch/annettes/data", "/scratch/annettes/data"),
        ("annette 1.0", "annette 1.0"),
    ],
)
def test_no_names_of_users(tmp_path: Path, text: str, shown: str) -> None:
    home = f"{tmp_path}/home/annette"
    shown = shown.format(home=home)
    given = {"a": [text.format(home=home), 3], "b": {"c": True}}
    assert finding.without_names(given) == {"a": [shown, 3], "b": {"c": True}}


def test_json_alone_on_stdout_without_settings_that_may_hold_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://annette:secret@proxy")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    result = call("doctor", "--device", "cpu", "--json", "-")
    assert json.loads(result.stdout)["threads and memory"]["OMP_PROC_BIND"] == "close"
    assert "secret" not in result.output


def test_a_network_that_gives_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flat, "forward", lambda self, maps: maps * float("nan"))
    result = call("doctor", "--device", "cpu")
    assert result.exit_code == 1
    assert "problem: flat_x does not compute on cpu: logits that are not finite\n  fix: " in result.stdout
    assert "\n1 problem" in result.stdout


def test_a_network_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Flat, maps: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("could not create a primitive\nin line 2")

    monkeypatch.setattr(Flat, "forward", fail)
    _, findings = found(lambda report: networks.look_at_networks("cpu", report, str))
    assert [each.what for each in findings] == [
        "flat_x does not compute on cpu: RuntimeError: could not create a primitive in line 2"
    ]


def test_packages_that_are_missing_old_or_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)  # its import fails
    asked = [
        Requirement(each) for each in ("nothing-there>=1", "numpy>=99", "tqdm", "rich>=1", "scipy; extra == 'mat'")
    ]
    monkeypatch.setattr(software, "requirements", lambda: asked)
    versions, findings = found(software.look_at_software)
    assert [each.what.partition(":")[0] for each in findings if each.broken] == [
        "nothing-there is not installed",
        f"numpy {versions['numpy']} is installed, expected >=99",
        f"tqdm {versions['tqdm'].partition(',')[0]} cannot be imported",
    ]
    assert [each.fix for each in findings if each.broken] == [
        "pip install 'nothing-there>=1'",
        "pip install 'numpy>=99'",
        "pip install --force-reinstall 'tqdm'",
    ]
    assert "scipy" not in versions


def test_without_pytorch_the_rest_is_still_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    result = call("doctor")
    assert result.exit_code == 1
    assert "cannot be imported: ModuleNotFoundError" in result.stdout
    assert "problem: networks cannot be imported" in result.stdout
    assert "processor" in result.stdout
    assert "can be written" in result.stdout


def test_a_part_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(report: object) -> dict[str, str]:
        raise LookupError("no such line")

    monkeypatch.setattr(doctor, "look_at_machine", fail)
    result = call("doctor", "--device", "cpu")
    assert result.exit_code == 1
    assert "problem: machine: this part of the doctor failed: LookupError: no such line" in result.stdout
    assert "flat_x" in result.stdout


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    result = call("doctor", "--device", "cpu")
    assert result.exit_code == 1
    assert f"problem: weights: {tmp_path}/file/hub/checkpoints cannot be written: NotADirectoryError" in result.stdout
    assert "fix: set TORCH_HOME to a folder of your own" in result.stdout


def test_limits_of_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(machine, "count_cores", lambda: 64)
    values, findings = found(machine.look_at_machine)
    assert values["cores"].endswith("for this process, processor time of 1.5 of them")
    assert (
        Finding(
            "the container gives the time of 1.5 cores, but threads are started for 64", "set OMP_NUM_THREADS=1", False
        )
        in findings
    )
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.cpu_quota() is None


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(machine, "count_cores", lambda: 2)
    values, findings = found(machine.look_at_threads)
    assert values["threads"] == "7 in PyTorch"
    assert [each.fix for each in findings] == ["set OMP_NUM_THREADS=2"]


def test_a_preloaded_allocator_is_named() -> None:
    maps = "7f-7f r--p 0 0:1 2 /usr/lib/x86_64-linux-gnu/libjemalloc.so.2\n7f-7f r-xp 0 0:1 3 /lib/libc.so.6\n"
    assert machine.ALLOCATORS.findall(maps) == ["jemalloc"]


def _gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str | None, count: int) -> tuple[Any, list[Finding]]:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n")
    monkeypatch.setattr(machine, "DRIVER", driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    facts = SimpleNamespace(name="NVIDIA Test", major=6, minor=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (3 * 2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_100", "compute_100"])
    return found(machine.look_at_gpus)


def test_a_gpu_and_one_that_is_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values, findings = _gpus(monkeypatch, tmp_path, "12.8", 1)
    assert values["GPU 0"] == "NVIDIA Test, 8.0 GiB, 3.0 GiB free, compute capability 6.1"
    assert values["driver"] == "535.104.05"
    assert [each.what for each in findings] == [
        "NVIDIA Test has compute capability 6.1, older than this PyTorch has code for"
    ]


@pytest.mark.parametrize(
    ("cuda", "broken", "part"),
    [(None, False, "built for the CPU only"), ("12.8", True, "finds no GPU, but the driver 535.104.05 is loaded")],
)
def test_a_gpu_that_pytorch_does_not_find(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str | None, broken: bool, part: str
) -> None:
    _, (only,) = _gpus(monkeypatch, tmp_path, cuda, 0)
    assert part in only.what
    assert only.broken is broken


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_where_one_is_wanted() -> None:
    values, (only,) = found(lambda report: networks.look_at_networks("cuda", report, str))
    assert values == {}
    assert only.what.startswith("--device cuda: ")
    assert only.broken
