"""Counts against the official code's, and what the command reports."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from ssaseg.cli.errors import CommandError
from ssaseg.cli.main import cli
from ssaseg.cli.profiling import counting, mask_table
from ssaseg.cli.profiling import paper_table as papertable
from ssaseg.cli.profiling import profile as profiling
from ssaseg.cli.profiling.counting import EVERY_OPERATION, MODULES_ONLY, count_modules
from ssaseg.cli.profiling.memory import LiveTensors
from ssaseg.cli.profiling.profile import run_profile
from ssaseg.models import Segmenter, build_model, save_model
from ssaseg.models.build import build_outline
from ssaseg.models.classifiers.linear import LinearClassifier
from ssaseg.models.masks import peers
from ssaseg.models.networks import vit_adapter

# SeaFormer-B, 150 classes, 512×512: parameters, those of inference, and GMACs in both countings; computed with the
# official code (commit e67fc2f), torch 2.13's flop counter and mmcv 1.7.2's `get_model_complexity_info`.
OFFICIAL = {
    "linear": (8605654, 8605654, 1.757585408, 1.77734656),
    "ssa": (8836694, 8733974, 2.073755648, 1.79928416),
}

TIMINGS = {key: {"p50": 1.0, "p90": 2.0} for key in ("network_ms", "post_ms")}


def profiled(capsys: pytest.CaptureFixture[str], target: str, **changes: Any) -> dict[str, Any]:
    given = {"classifiers": (), "classes": None, "size": (512, 512), "json_out": "-", "device": "cpu", "runs": 1}
    assert run_profile(target, **{**given, **changes}) == 0
    return json.loads(capsys.readouterr().out)


def test_counts_equal_the_official_ones(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "measure_stages", lambda passes, runs: [{}] * len(passes))  # takes a second
    report = profiled(capsys, "seaformer_b")
    assert [column["classifier"] for column in report["columns"]] == ["linear", "ssa"]
    for column in report["columns"]:
        parameters, deployed, operations, modules = OFFICIAL[column["classifier"]]
        assert (column["parameters"], column["parameters_deployed"]) == (parameters, deployed)
        assert column["gmacs"][EVERY_OPERATION] == pytest.approx(operations, rel=1e-9)
        assert column["gmacs"][MODULES_ONLY] == pytest.approx(modules, rel=1e-9)
        for key in ("network_ms", "post_ms"):
            assert 0 < column[key]["p50"] <= column[key]["p90"]
        # Weights alone are 33 MiB; all activations at once would be some 200.
        assert 40 < column["peak_mib"] < 150
    assert set(report["countings"]) == {EVERY_OPERATION, MODULES_ONLY}


def test_the_table_names_countings_and_conditions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    destination = tmp_path / "profile.json"
    assert run_profile("seaformer_t", ["ssa"], 8, (64, 96), str(destination), "cpu", 2) == 0
    out = capsys.readouterr().out
    for said in ("64x96", "8 classes", "every operation", "modules only", "p50 / p90", "peak memory", "2 timed passes"):
        assert said in out, said
    assert "linear" not in out.splitlines()[2]
    assert json.loads(destination.read_text())["columns"][0]["classifier"] == "ssa"


def test_a_classifier_that_is_given_twice_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(profiling, "run_profile", lambda **given: calls.append(given["classifiers"]) or 0)
    words = [word for name in ("ssa", "linear", "ssa") for word in ("--classifier", name)]
    assert CliRunner().invoke(cli, ["profile", "seaformer_t", *words]).exit_code == 0
    assert calls == [("ssa", "linear")]


def test_a_checkpoint_brings_its_classifier_and_classes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    save_model(path, build_model("seaformer_t", 6, "linear"), {})
    report = profiled(capsys, str(path), size=(64, 64))
    assert (report["model"], report["classes"], report["size"]) == ("seaformer_t", 6, [64, 64])
    assert [column["classifier"] for column in report["columns"]] == ["linear"]
    with pytest.raises(CommandError, match="its classifier is linear, not ssa"):
        profiled(capsys, str(path), classifiers=["ssa"])
    with pytest.raises(CommandError, match="it has 6 classes, not 20"):
        profiled(capsys, str(path), classes=20)


@pytest.mark.parametrize(
    ("target", "said"), [("seaformer_bb", "did you mean seaformer_b"), ("x.safetensors", "existing")]
)
def test_an_unknown_target_is_named(target: str, said: str) -> None:
    with pytest.raises(CommandError, match=said):
        run_profile(target, [], 150, (64, 64), None, "cpu", 1)


def test_modules_are_counted_by_mmcvs_rules() -> None:
    cases: list[tuple[nn.Module, tuple[int, ...], int]] = [
        (nn.Conv2d(6, 9, 3, stride=2, padding=1, groups=3), (1, 6, 8, 8), 9 * 16 * (2 * 9 + 1)),
        (nn.Conv2d(6, 9, 1, bias=False), (1, 6, 5, 4), 9 * 20 * 6),
        (nn.ConvTranspose2d(6, 8, 2, 2, groups=2), (1, 6, 5, 4), 20 * 6 * 4 * 4 + 8 * 80),
        (nn.Linear(7, 3), (2, 5, 7), 70 * 3),  # mmcv leaves the bias out
        (nn.BatchNorm2d(4), (1, 4, 3, 3), 0),
        (nn.LayerNorm(4), (3, 4), 24),
        (nn.GroupNorm(2, 4, affine=False), (1, 4, 3, 3), 36),
        (nn.ReLU(), (1, 4, 3, 3), 36),
        (nn.Hardsigmoid(), (1, 4, 3, 3), 36),
        (nn.GELU(), (1, 4, 3, 3), 0),
        (nn.AdaptiveAvgPool2d(1), (1, 4, 3, 3), 36),
        (nn.Upsample(scale_factor=2), (1, 4, 3, 3), 144),
    ]
    for module, shape, expected in cases:
        with torch.inference_mode():
            assert count_modules(module.eval(), torch.ones(shape)) == expected, module


def test_a_projection_inside_the_official_attention_is_not_counted() -> None:
    """SegFormer-B0 with the plain classifier: mmcv 1.7.2's own number for mmsegmentation 0.30."""
    with torch.device("meta"):
        model = build_outline("segformer_b0", 150, "linear").eval()
        model.classifier.forward = nn.Sequential(model.classifier.conv_seg)  # type: ignore[method-assign]
        assert count_modules(model, torch.empty(1, 3, 512, 512)) == 6_986_989_568


def test_fused_attention_is_counted() -> None:
    """A block of ViT-Adapter-T by hand, since the flop counter passes over the attention that CPUs compute."""
    block = vit_adapter.Block(192, 3, 0.0).eval().requires_grad_(False)
    model = Segmenter(block, nn.Identity(), LinearClassifier(192, 2))  # type: ignore[arg-type]
    model.forward = block.forward  # type: ignore[method-assign]
    found = counting.count(model, torch.zeros(1, 64, 192))["gmacs"][EVERY_OPERATION]
    assert found * 1e9 == pytest.approx(12 * 64 * 192**2 + 2 * 64**2 * 192)


def test_live_tensors_follow_what_is_freed() -> None:
    weight = torch.ones(256, 1024)  # 1 MiB
    with LiveTensors([weight]) as live:
        first = weight + 1
        second = weight.view(-1) * 2  # the view is no memory of its own
        del first
        third = second.add_(1)  # in place
        kept = [third + index for index in range(3)]
    assert len(kept) == 3
    assert live.peak == 4 * 2**20
    del second, third, kept
    assert live.now == 0


def test_paper_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows within 1 % in parameters and 3 % in multiply-accumulates; the printed cells are the rows'.

    Every published row's figures are looked at in models/test_networks.py.
    """
    assert sum(map(len, papertable.PAPER.values())) == 26
    some = {"afformer_b": "linear", "seaformer_b": "ssa", "cgrseg_l": "linear"}
    paper = {name: {kind: papertable.PAPER[name][kind]} for name, kind in some.items()}
    monkeypatch.setattr(papertable, "PAPER", paper)
    monkeypatch.setattr(papertable, "measure_latency", lambda models, image, runs: [TIMINGS] * len(models))
    monkeypatch.setattr(mask_table, "KNOWN", {})  # each takes seconds
    assert papertable.run_paper_table("-", "cpu", 1) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(row["model"], row["classifier"]) for row in report["rows"]] == [
        (name, kind) for name, kinds in papertable.PAPER.items() for kind in kinds
    ]
    assert len(report["rows"]) == 3
    for row in report["rows"]:
        assert abs(row["parameters"] / row["paper"]["parameters"] - 1) < 0.01, row
        assert abs(row["gmacs"][MODULES_ONLY] / row["paper"]["gmacs"] - 1) < 0.03, row
        assert row["gmacs"][EVERY_OPERATION] > 0.9 * row["paper"]["gmacs"]
    papertable.print_paper_table(report)
    table = capsys.readouterr().out
    for cell in ("3.004 (+0.1 %)", "8.734 (-0.8 %)", "14.899 (-0.0 %)", "66,048", "43.3", "39.94", "48.57", "42.46"):
        assert cell in table


def test_paper_table_says_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    counts = {"parameters_deployed": 70_000_000, "parameters_auxiliary": 1_660_000,
              "gmacs": {EVERY_OPERATION: 171.1, MODULES_ONLY: 165.0}}  # fmt: skip
    row = papertable.describe("ocrnet_hr48", "linear", counts) | TIMINGS
    assert row["parameters"] == 71.66
    assert row["deviation_percent"] == {"parameters": None, "gmacs": pytest.approx(0.121, abs=1e-3)}
    papertable.print_paper_table(
        {"rows": [row], "masks": [], "classes": 150, "size": [512, 512], **profiling.conditions(torch.device("cpu"), 1)}
    )
    out = capsys.readouterr().out
    cells = next(line for line in out.splitlines() if "ocrnet_hr48 linear" in line).split()
    assert "71.660" in cells
    assert cells.count("-") == 5  # parameters, latency and scores
    assert papertable.published_miou("ade20k", "upernet_vit_adapter_l", "ssa") == 55.39
    assert papertable.published_miou("ade20k", "upernet_swin_b", "ssa") is None
    assert "8.7 M parameters are a misprint" in out


def test_mask_methods_stand_beside_networks_with_ssa(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that is missing is reported; nothing but the rows with SSA comes from the first table."""
    counts = {"parameters": 35_566_248, "gmacs": {EVERY_OPERATION: 34.392, MODULES_ONLY: 26.3}}
    pem = mask_table.describe("pem_r50", counts, mask_table.KNOWN["pem_r50"]) | TIMINGS
    deployed = {"parameters_deployed": 8_733_974, "parameters_auxiliary": 0, **counts}
    others = [papertable.describe("seaformer_b", kind, deployed) | TIMINGS for kind in ("linear", "ssa")]
    mask_table.print_masks([pem], others, "150 classes")
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["pem_r50", "masks", "35.57", "35.6", "34.39", "33.85", "46.9", "2.0"] in rows
    assert ["seaformer_b", "ssa", "8.73", "8.8", "34.39", "-", "1.8", "2.0"] in rows
    assert "seaformer_b linear" not in out
    assert "46.9 GMACs are not reproduced: its official code has 33.9" in out
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    monkeypatch.setattr(mask_table, "KNOWN", {"mask2former_r50": mask_table.KNOWN["mask2former_r50"]})
    assert mask_table.measure_masks(torch.zeros(1, 3, 64, 64), 1) == []
    assert "mask2former_r50 needs the packages transformers and scipy" in capsys.readouterr().err


def test_paper_table_runs_and_is_told_apart() -> None:
    """From the command line, without and with a name."""
    runner = CliRunner()
    for words in ([], ["seaformer_t", "--paper-table"], ["--paper-table", "--classes", "3"]):
        result = runner.invoke(cli, ["profile", *words])
        assert (result.exit_code, "--paper-table" in result.output) == (2, True), words
