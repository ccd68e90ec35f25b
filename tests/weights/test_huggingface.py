"""Folders of Hugging Face transformers: logits, both directions, and configurations that ssaseg has no network for.

The tests that need `transformers` itself are at the end; its logits are also in `fixtures/transformers.json`.
"""

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from converting import convert, done
from golden_weights import filled
from networks import tiny_swin
from places import PROJECT
from torch import Tensor
from torch.nn import functional as F

from ssaseg.cli.errors import CommandError
from ssaseg.cli.training.preflight import find_start
from ssaseg.cli.weights.pretrained import load_pretrained
from ssaseg.datasets.labels import label_space
from ssaseg.models import CheckpointError, Segmenter, build_model, load_model, save_model

FIGURES: dict[str, list[float]] = json.loads((PROJECT / "tests" / "fixtures" / "transformers.json").read_text())
NAMES = ("segformer_nvidia_b0", "upernet_swin_x")
CLASSES = ["sky", "road", "car"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def tiny() -> Iterator[None]:
    with tiny_swin():
        yield


def network(name: str, classes: int = 3, classifier: str = "linear") -> Segmenter:
    """A network in which no tensor has the value of a fresh one."""
    torch.manual_seed(1)
    model = build_model(name, classes, classifier)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(torch.rand_like(value) * 0.1 if value.is_floating_point() else 7)
    return model


def folder_of(tmp_path: Path, model: Segmenter, **metadata: Any) -> Path:
    """A folder `hf`, written from `ours.safetensors`."""
    save_model(tmp_path / "ours.safetensors", model, {"classes": CLASSES, **metadata})
    done(tmp_path / "ours.safetensors", tmp_path / "hf")
    return tmp_path / "hf"


def change(path: Path, **values: Any) -> None:
    """Changes keys of a JSON file; `a__b` is key b below key a, and ... removes a key."""
    content = json.loads(path.read_text())
    for key, value in values.items():
        *above, last = key.split("__")
        place = content
        for each in above:
            place = place[each]
        place[last] = value
        if value is ...:
            del place[last]
    path.write_text(json.dumps(content))


def logits_of(name: str, model: Callable[[Tensor], Any]) -> Tensor:
    """Logits in the size that transformers returns. The input is so small that the eps of norms counts."""
    images = 0.05 * torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1234))
    with torch.no_grad():
        logits = model(images)
    if isinstance(logits, Tensor):
        size = (16, 24) if name.startswith("segformer") else (64, 96)
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    found: Tensor = logits.logits
    return found


# ---- without transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name: str) -> None:
    found = logits_of(name, filled(name, "linear"))
    assert found.std() > 0.05
    torch.testing.assert_close(found.flatten()[::997], torch.tensor(FIGURES[name]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    """Bit-equal, from the folder and from its file; classes, sizes, means and the meaning of label 0 come back."""
    model = network(name)
    protocol = {"scale": [800, 600], "multiple": 32}
    folder = folder_of(tmp_path, model, protocol=protocol, mean=[1.0, 2.0, 3.0], reduce_zero_label=True)
    for source in (folder, folder / "model.safetensors"):
        output = done(source, tmp_path / "back.safetensors")
        assert f"read as {name}, linear, 3 classes" in output
        assert "label 1 is class 0, and 0 is ignored" in output
        loaded, metadata = load_model(tmp_path / "back.safetensors")
        assert (metadata["classes"], metadata["mean"]) == (CLASSES, [1.0, 2.0, 3.0])
        assert metadata["protocol"] == {"scale": [800, 600], "multiple": None}
        assert metadata["reduce_zero_label"] is True
        state = loaded.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_official_names_there_and_back(tmp_path: Path) -> None:
    """NVIDIA's: recognised among networks with the same backbone; a layer that nothing calls is named."""
    model = network("segformer_nvidia_b0")
    save_model(tmp_path / "ours.safetensors", model, {"classes": CLASSES})
    done(tmp_path / "ours.safetensors", tmp_path / "official.pth")
    state = torch.load(tmp_path / "official.pth", weights_only=True)["state_dict"]
    assert state["decode_head.linear_pred.weight"].shape == (3, 256, 1, 1)
    assert state["decode_head.linear_c4.proj.weight"].shape == (256, 256)
    state["decode_head.conv_seg.weight"] = torch.zeros(7, 128, 1, 1)
    torch.save({"state_dict": state}, tmp_path / "official.pth")
    output = done(tmp_path / "official.pth", tmp_path / "back.safetensors")
    assert "read as segformer_nvidia_b0, linear, 3 classes" in output
    assert "not used     1: decode_head.conv_seg.weight" in output
    again = load_model(tmp_path / "back.safetensors")[0].state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())


def test_a_folder_without_auxiliary_head(tmp_path: Path) -> None:
    """All other weights are taken, and the size without an upper limit is read."""
    from safetensors.torch import load_file, save_file

    model = network("upernet_swin_x")
    folder = folder_of(tmp_path, model)
    state = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in state.items() if not key.startswith("auxiliary_head.")}
    assert len(kept) < len(state)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    change(folder / "config.json", use_auxiliary_head=False)
    change(folder / "preprocessor_config.json", do_resize=True, size={"shortest_edge": 512})
    output = done(folder, tmp_path / "back.safetensors")
    assert "no auxiliary head in the folder" in output
    loaded, metadata = load_model(tmp_path / "back.safetensors")
    assert min(metadata["protocol"]["scale"]) == 512
    assert max(metadata["protocol"]["scale"]) == 16384
    own, back = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(value, back[key]) for key, value in own.items() if not key.startswith("auxiliary."))


def test_files_of_older_versions(tmp_path: Path) -> None:
    """A pickle, a single size, `reduce_labels`; buffers that follow from the window, a norm that nothing uses."""
    from safetensors.torch import load_file

    model = network("upernet_swin_x")
    folder = folder_of(tmp_path, model)
    state = load_file(folder / "model.safetensors")
    state["backbone.encoder.layers.0.blocks.0.attention.self.relative_position_index"] = torch.zeros(49, 49).long()
    state["backbone.swin.layernorm.weight"] = torch.ones(192)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    change(
        folder / "preprocessor_config.json",
        do_resize=True,
        size=640,
        reduce_labels=True,
        do_reduce_labels=...,
        do_rescale=...,
    )
    output = done(folder, tmp_path / "back.safetensors")
    assert "not used     2: " in output
    assert "transformers stretches" in output
    loaded, metadata = load_model(tmp_path / "back.safetensors")
    assert (metadata["protocol"]["scale"], metadata["reduce_zero_label"]) == ([640, 640], True)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_published_classes_bring_their_colours_and_protocol(tmp_path: Path) -> None:
    space = label_space("pascal_context_59")
    folder = folder_of(tmp_path, network("segformer_nvidia_b0", 59), classes=space.classes)
    output = done(folder, tmp_path / "back.safetensors")
    metadata = load_model(tmp_path / "back.safetensors")[1]
    assert (metadata["palette"], metadata["protocol"]) == (space.palette, space.protocol)
    assert "a published data set, so as there: fitted into [520, 520]" in output
    change(folder / "config.json", id2label={str(k): f"LABEL_{k}" for k in range(59)})
    assert "59 without names" in done(folder, tmp_path / "back.safetensors")
    done(tmp_path / "back.safetensors", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["id2label"]["3"] == "LABEL_3"
    assert load_model(tmp_path / "back.safetensors")[1]["classes"][0] == "class_0"
    assert "give their names with --dataset" in convert(folder, tmp_path / "x.safetensors", "--classes", "a,b").output


@pytest.mark.parametrize("name", ["segformer_b0", "segformer_nvidia_b0"])
def test_a_folder_to_start_from(tmp_path: Path, name: str) -> None:
    """The backbone for either decoder; all of it, class rows by name, where the decoder is the same."""
    source = network("segformer_nvidia_b0")
    folder = folder_of(tmp_path, source)
    assert find_start(str(folder), name) == folder
    start = network(name, 2, "linear")
    before = {key: value.clone() for key, value in start.state_dict().items()}
    found = load_pretrained(start, folder, ["car", "lake"])
    assert found.backbone_share == 1
    new = "rows new     all 2: the file has another kind of classifier"
    assert (new in str(found), "rows kept    1: car" in str(found)) == (name != source.name, name == source.name)
    assert "label 0 is class 0" in str(found)
    state, pretrained, rows = start.state_dict(), source.state_dict(), start.class_rows()
    for key in state:
        if key.startswith("backbone.") or (name == source.name and key not in rows):
            assert torch.equal(state[key], pretrained[key]), key
    same = name == source.name
    assert torch.equal(state["classifier.conv_seg.bias"][0], pretrained["classifier.conv_seg.bias"][2]) == same
    assert torch.equal(state["classifier.conv_seg.bias"][1], before["classifier.conv_seg.bias"][1])


def test_an_imagenet_folder_is_a_backbone(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = network("segformer_nvidia_b0")
    folder = folder_of(tmp_path, source)
    state = load_file(folder / "model.safetensors")
    state = {key: value for key, value in state.items() if not key.startswith("decode_head.")}
    save_file({**state, "classifier.weight": torch.zeros(10, 256)}, folder / "model.safetensors", {"format": "pt"})
    change(folder / "config.json", architectures=["SegformerForImageClassification"], decoder_hidden_size=...)
    output = done(folder, tmp_path / "backbone.safetensors")
    assert "read as segformer_b0, only the backbone" in output
    assert "not used     1: backbone.classifier.weight" in output
    start = network("segformer_b0", 2, "ssa")
    assert load_pretrained(start, tmp_path / "backbone.safetensors").complete
    key = "backbone.stages.2.blocks.1.attention.qkv_weight"
    assert torch.equal(start.state_dict()[key], source.state_dict()[key])


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config", {"architectures": ["DetrForObjectDetection"]}, 'architectures: got "DetrForObjectDetection"'),
        ("config", {"architectures": None}, "architectures: got null"),
        ("config", {"depths": [2, 2, 2, 3]}, "depths, hidden_sizes: got [[2, 2, 2, 3]"),
        ("config", {"decoder_hidden_size": 768}, "decoder_hidden_size: got 768\nexpected 256"),
        ("config", {"num_attention_heads": [1, 2, 4, 8]}, "num_attention_heads: got [1, 2, 4, 8]"),
        ("config", {"id2label": {"0": "a", "2": "b"}}, "id2label: got"),
        ("config", {"id2label": {"0": "a", "1": 5, "2": "b"}}, "id2label: got"),
        ("config", {"id2label": {"0": "a", "1": "b"}}, "has 3 rows, id2label in config.json has 2 names"),
        ("preprocessor_config", {"do_resize": True, "size": {"height": 512}}, 'size: got {"height": 512}'),
        ("preprocessor_config", {"do_resize": True, "size": 10**9}, "preprocessor_config.json: test.scale"),
        ("preprocessor_config", {"do_reduce_labels": "yes"}, 'do_reduce_labels: got "yes"'),
        ("preprocessor_config", {"image_std": [1, 0, 1]}, "image_std: got [1, 0, 1]"),
        ("preprocessor_config", {"rescale_factor": 0}, "rescale_factor: got 0"),
        ("preprocessor_config", {"do_center_crop": True}, "do_center_crop: got true"),
    ],
)
def test_a_segformer_folder_that_is_refused(
    tmp_path: Path, file: str, values: dict[str, Any], message: str, segformer_folder: Path
) -> None:
    refused(tmp_path, segformer_folder, file, values, message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone_config__window_size": 12}, "backbone_config.window_size: got 12\nexpected 7"),
        ({"backbone_config__model_type": "convnext"}, 'backbone_config.model_type: got "convnext"'),
        ({"backbone_config__mlp_ratio": 2.0}, "backbone_config.mlp_ratio: got 2.0"),
        ({"backbone_config__use_absolute_embeddings": True}, "use_absolute_embeddings: got true"),
        ({"backbone_config__out_features": ["stage4"]}, "out_features: got"),
        ({"backbone_config__depths": [2, 2, 6, 3]}, "backbone_config.embed_dim, depths, num_heads: got [24"),
        ({"auxiliary_in_channels": 512}, "auxiliary_in_channels: got 512\nexpected 96"),
        ({"pool_scales": [1, 2, 3]}, "pool_scales: got [1, 2, 3]"),
    ],
)
def test_an_upernet_folder_that_is_refused(
    tmp_path: Path, values: dict[str, Any], message: str, upernet_folder: Path
) -> None:
    refused(tmp_path, upernet_folder, "config", values, message)


def refused(tmp_path: Path, folder: Path, file: str, values: dict[str, Any], message: str) -> None:
    """Changes one file of a folder, and asserts that an error of at most three lines names the file and the key."""
    path = folder / f"{file}.json"
    before = path.read_text()
    try:
        change(path, **values)
        result = convert(folder, tmp_path / "x.safetensors")
    finally:
        path.write_text(before)
    assert (result.exit_code, message in result.output) == (2, True), result.output
    assert len(result.output.splitlines()) <= 3
    assert not (tmp_path / "x.safetensors").exists()


@pytest.fixture(scope="module")
def segformer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("segformer"), network("segformer_nvidia_b0"))


@pytest.fixture(scope="module")
def upernet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with tiny_swin():
        return folder_of(tmp_path_factory.mktemp("upernet"), network("upernet_swin_x"))


def test_a_folder_with_a_part_missing(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, network("segformer_nvidia_b0"))
    (folder / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(CommandError, match=r"model\.pretrained=.*without config\.json"):
        load_pretrained(network("segformer_b0"), folder)
    output = convert(folder, tmp_path / "x.safetensors").output
    assert "a folder of transformers" in output
    (folder / "config.json").write_text('{"model_type": "segformer", [')
    assert "config.json: cannot be read" in convert(folder, tmp_path / "x.safetensors").output
    (tmp_path / "config.json").rename(folder / "config.json")
    (folder / "preprocessor_config.json").unlink()
    assert "not resized, mean and std of ImageNet" in done(folder, tmp_path / "x.safetensors")
    (folder / "model.safetensors").unlink()
    assert "no weights in it" in convert(folder, tmp_path / "x.safetensors").output
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "the weights are in several files" in convert(folder, tmp_path / "x.safetensors").output


def test_what_transformers_does_not_have_is_not_written(tmp_path: Path) -> None:
    cases = [("segformer_nvidia_b0", "ssa"), ("segformer_b0", "linear"), ("seaformer_t", "linear")]
    for name, classifier in cases:
        save_model(tmp_path / "ours.safetensors", network(name, 3, classifier), {})
        result = convert(tmp_path / "ours.safetensors", tmp_path / "hf")
        assert (result.exit_code, f"transformers has no {name} with {classifier}" in result.output) == (2, True)
        assert not (tmp_path / "hf").exists()
    assert "cannot convert to .bin" in convert(tmp_path / "ours.safetensors", tmp_path / "x.bin").output


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """A folder of transformers is written only where nothing is; no file is written over the one that it is made of."""
    source = network("segformer_nvidia_b0")
    folder = folder_of(tmp_path, source)
    before = {path: path.read_bytes() for path in [*folder.iterdir(), tmp_path / "ours.safetensors"]}
    for destination in (folder, tmp_path, Path("")):
        assert "a folder that is not empty\nexpected" in convert(tmp_path / "ours.safetensors", destination).output
    assert "are the same file" in convert(folder, folder / "model.safetensors").output
    (tmp_path / "plain").write_text("mine")
    assert "a file without a suffix\nexpected" in convert(tmp_path / "ours.safetensors", tmp_path / "plain").output
    assert (tmp_path / "plain").read_text() == "mine"
    assert {path: path.read_bytes() for path in before} == before
    (tmp_path / "empty.v2").mkdir()
    done(tmp_path / "ours.safetensors", tmp_path / "empty.v2")
    assert (tmp_path / "empty.v2" / "config.json").exists()


def test_a_configuration_of_other_weights(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, network("segformer_nvidia_b0"))
    config = folder / "config.json"
    kept = config.read_text()
    change(config, hidden_sizes=[64, 128, 320, 512])
    output = convert(folder, tmp_path / "x.safetensors").output
    assert "its config.json says segformer_nvidia_b1; its tensors look like segformer_nvidia_b0" in output
    assert output.rstrip().endswith("correct config.json")
    config.write_text(kept)
    change(config, architectures=["SegformerForImageClassification"])
    output = convert(folder, tmp_path / "x.safetensors").output
    assert "architectures: got SegformerForImageClassification\nexpected a segmentation network" in output


def test_a_file_of_transformers_is_no_checkpoint_yet(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, network("segformer_nvidia_b0"))
    with pytest.raises(CheckpointError, match="convert official segmentation checkpoints with `ssaseg convert`"):
        load_model(folder / "model.safetensors")


def test_a_folder_is_not_converted_further_at_once(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, network("segformer_nvidia_b0"))
    assert "is not a checkpoint of ssaseg\nconvert it first" in convert(folder, tmp_path / "x.onnx").output
    assert "--model says segformer_b1" in convert(folder, tmp_path / "x.safetensors", "--model", "segformer_b1").output


# ---- with transformers -------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers: pip install -e '.[test]'")
@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_and_saves(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key is missing or unexpected; the same logits; what it saves is read as the same tensors, bit for bit."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    kind = "Segformer" if name.startswith("segformer") else "UperNet"
    model = filled(name, "linear")
    folder = folder_of(tmp_path, model, classes=[f"thing {k}" for k in range(150)], reduce_zero_label=True)
    peer, report = getattr(transformers, f"{kind}ForSemanticSegmentation").from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    assert peer.config.id2label[149] == "thing 149"
    torch.testing.assert_close(logits_of(name, model), logits_of(name, peer.eval()), rtol=0, atol=1e-5)
    peer.save_pretrained(tmp_path / "saved")
    done(tmp_path / "saved", tmp_path / "back.safetensors")
    loaded, metadata = load_model(tmp_path / "back.safetensors")
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert metadata["classes"][149] == "thing 149"
