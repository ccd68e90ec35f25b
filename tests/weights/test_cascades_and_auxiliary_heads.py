"""Official checkpoints of networks with an auxiliary head or a first stage: there and back, and to other classes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from ssaseg.cli.main import cli
from ssaseg.cli.weights.matching import outline
from ssaseg.cli.weights.pretrained import load_pretrained
from ssaseg.models import Segmenter, build_model, load_model
from ssaseg.models.networks import upernet
from ssaseg.models.networks.swin import Variant
from ssaseg.models.official import official_entries

NAMES = ("sky", "road", "car", "tree")


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """UPerNet with few channels."""
    outline.cache_clear()
    monkeypatch.setitem(upernet.VARIANTS, "upernet_swin_t", Variant(24, (2, 2, 2, 2), (1, 2, 4, 8)))
    monkeypatch.setattr(upernet.UPerDecoder.__init__, "__defaults__", (32,))
    yield
    outline.cache_clear()


def network(name: str, classifier: str, classes: int, seed: int) -> Segmenter:
    torch.manual_seed(seed)
    return build_model(name, classes, classifier)


def official(model: Segmenter) -> dict[str, Tensor]:
    state = model.state_dict()
    return {key: value.contiguous() for entry in official_entries(model) for key, value in entry.give(state).items()}


def convert(*words: str | Path) -> str:
    result = CliRunner().invoke(cli, ["convert", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output


CASES = [("ocrnet_hr18", "ssa", "decoder.classifier"), ("upernet_swin_t", "linear", "auxiliary.aux.classifier")]


@pytest.mark.parametrize(("name", "classifier", "further"), CASES)
def test_official_checkpoint(tmp_path: Path, name: str, classifier: str, further: str) -> None:
    state = official(network(name, classifier, 4, seed=1))
    unused = {"decode_head.1.ssa_loss.criterion.empty_weight": torch.ones(5)} if classifier == "ssa" else {}
    if name.startswith("upernet"):
        unused = {
            f"backbone.stages.{k}.blocks.0.attn.w_msa.relative_position_index": torch.zeros(49, 49).long()
            for k in range(4)
        }
    torch.save({"state_dict": state | unused, "meta": {"CLASSES": NAMES}}, tmp_path / "official.pth")

    text = convert(tmp_path / "official.pth", tmp_path / "ours.safetensors")
    assert f"read as {name}, {classifier}, 4 classes" in text
    assert f"not used     {len(unused)}: {next(iter(unused))}" in text
    convert(tmp_path / "ours.safetensors", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert back.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in back.items())
    if "auxiliary" in further:
        convert(tmp_path / "ours.safetensors", tmp_path / "small.safetensors", "--deploy")
        assert not load_model(tmp_path / "small.safetensors")[0].auxiliary

    start = network(name, classifier, 3, seed=2)
    before = {key: value.clone() for key, value in start.state_dict().items()}
    report = load_pretrained(start, tmp_path / "official.pth", ("car", "pole", "sky"))
    assert "the file has 4 classes, the model 3" in str(report)
    assert "rows kept    2: car, sky" in str(report)
    theirs = {
        key: state[given]
        for entry in official_entries(start)
        for key, given in zip(entry.ours, entry.theirs, strict=True)
    }
    rows = start.class_rows()
    assert {f"{further}.conv_seg.weight", f"{further}.conv_seg.bias", "classifier.conv_seg.weight"} < {*rows}
    for key, value in start.state_dict().items():
        if key in rows:
            expected = torch.stack([theirs[key][2], before[key][1], theirs[key][0]])
            assert torch.equal(value, expected), key
        else:
            assert torch.equal(value, theirs[key]), key


def test_other_classifier_and_missing_classes(tmp_path: Path) -> None:
    """The errors name the keys of the last stage."""
    state = official(network("ocrnet_hr18", "linear", 4, seed=1))
    torch.save(state, tmp_path / "official.pth")
    words = ["convert", str(tmp_path / "official.pth"), str(tmp_path / "ours.safetensors"), "--classifier", "ssa"]
    output = CliRunner().invoke(cli, words).output
    assert "it looks like linear: it has no decode_head.1.center_pos.weight\nuse --classifier linear" in output
    del state["decode_head.1.conv_seg.weight"]
    torch.save(state, tmp_path / "official.pth")
    assert "has no decode_head.1.conv_seg.weight\n" in CliRunner().invoke(cli, words[:3]).output


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_an_auxiliary_head_of_other_classes_keeps_its_weights(tmp_path: Path, rows: int) -> None:
    """Its rows have no names. Two rows are as many as the classes of the model."""
    state = official(network("upernet_swin_t", "linear", 4, seed=1))
    for key in ("auxiliary_head.conv_seg.weight", "auxiliary_head.conv_seg.bias"):
        state[key] = torch.ones(rows, *state[key].shape[1:])
    torch.save({"state_dict": state, "meta": {"CLASSES": NAMES}}, tmp_path / "official.pth")
    start = network("upernet_swin_t", "linear", 2, seed=2)
    before = {key: value.clone() for key, value in start.state_dict().items()}
    load_pretrained(start, tmp_path / "official.pth", ("car", "pole"))
    after = start.state_dict()
    for key in ("weight", "bias"):
        further = f"auxiliary.aux.classifier.conv_seg.{key}"
        assert torch.equal(after[further], before[further])
        assert torch.equal(after[f"classifier.conv_seg.{key}"][0], state[f"decode_head.conv_seg.{key}"][2])


def test_a_table_without_dimensions_is_an_error(tmp_path: Path) -> None:
    state = official(network("upernet_swin_t", "linear", 4, seed=1))
    state["backbone.stages.0.blocks.0.attn.w_msa.relative_position_bias_table"] = torch.tensor(1.0)
    torch.save({"state_dict": state}, tmp_path / "official.pth")
    result = CliRunner().invoke(cli, ["convert", str(tmp_path / "official.pth"), str(tmp_path / "x.safetensors")])
    assert (result.exit_code, "Traceback" in result.output) == (2, False), result.output
