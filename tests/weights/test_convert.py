"""`convert` and `load_pretrained` on files shaped like the official ones, made here from our own weights."""

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from converting import convert
from torch import Tensor

from ssaseg.cli.errors import CommandError
from ssaseg.cli.weights.pretrained import load_pretrained
from ssaseg.datasets.labels import label_space
from ssaseg.models import CLASSIFIERS, CheckpointError, Segmenter, build_model, load_model, save_model
from ssaseg.models.official import official_keys


def network(classes: int = 11, classifier: str = "ssa", name: str = "seaformer_t", seed: int = 1) -> Segmenter:
    """A network in which no tensor has the value of a fresh one."""
    torch.manual_seed(seed)
    model = build_model(name, classes, classifier, options={"memory": 20} if classifier == "gmmseg" else None)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(torch.rand_like(value) * 0.1 if value.is_floating_point() else 7)
    return model


def official_state(model: Segmenter) -> dict[str, Tensor]:
    state = model.state_dict()
    names = {ours: theirs for ours, theirs in official_keys(model).items() if ours not in model.memory()}
    return {theirs: state[ours].clone().contiguous() for ours, theirs in names.items()}


def imagenet_state(model: Segmenter) -> dict[str, Tensor]:
    """As the classification checkpoints: the backbone without prefix, and its classifier."""
    official = official_state(model)
    bare = {key.removeprefix("backbone."): value for key, value in official.items() if key.startswith("backbone.")}
    return {**bare, "linear.weight": torch.rand(1000, 8), "linear.bias": torch.rand(1000)}


def assert_same(model: Segmenter, expected: dict[str, Tensor], section: str = "") -> None:
    state = model.state_dict()
    for key in (key for key in state if key.startswith(section)):
        assert torch.equal(state[key], expected[key]), key


def test_mmseg_checkpoint(tmp_path: Path) -> None:
    """`module.` prefixes, a meta with odd but inert content, a buffer that no loss reads: all as mmseg 0.x writes."""
    model = network()
    state = {f"module.{key}": value for key, value in official_state(model).items()}
    state["module.decode_head.ssa_loss.criterion.empty_weight"] = torch.ones(12)
    meta = {"env_info": "sys.platform: linux", "CLASSES": tuple(f"thing {k}" for k in range(11)), "PALETTE": None}
    meta |= {"hook_msgs": {}, "iter": np.int64(160000), "best": np.float32(42.4), "args": argparse.Namespace(a=[None])}
    torch.save({"meta": meta, "state_dict": state, "optimizer": {"state": {}}}, tmp_path / "official.pth")
    result = convert(tmp_path / "official.pth", tmp_path / "ours.safetensors", "--model", "seaformer_t")
    assert result.exit_code == 0, result.output
    assert "100.0 %" in result.output
    assert "not used     1: decode_head.ssa_loss.criterion.empty_weight" in result.output
    loaded, metadata = load_model(tmp_path / "ours.safetensors")
    assert metadata["classes"] == [f"thing {k}" for k in range(11)]
    assert_same(loaded, model.state_dict())


@pytest.mark.parametrize("zipped", [True, False])
def test_timm_checkpoint_is_a_backbone_and_its_average_wins(tmp_path: Path, zipped: bool) -> None:
    """Zip and legacy format, Namespace, NumPy numbers; `state_dict_ema` differs from `state_dict` and is taken."""
    raw, average = network(seed=1), network(seed=2)
    content = {
        "epoch": 599,
        "arch": "SeaFormer_T",
        "state_dict": imagenet_state(raw),
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        "args": argparse.Namespace(lr=np.float64(0.5), mean=np.zeros(3), names=np.array(["a", "b"])),
        "state_dict_ema": imagenet_state(average),
        "metric": np.float64(76.4),
    }
    torch.save(content, tmp_path / "cls.pth.tar", _use_new_zipfile_serialization=zipped)
    result = convert(tmp_path / "cls.pth.tar", tmp_path / "backbone.safetensors")
    assert result.exit_code == 0, result.output
    assert "(state_dict_ema), read as seaformer_t, only the backbone" in result.output
    assert "missing      0" in result.output
    assert "not used     2: linear.weight, linear.bias" in result.output
    for path in (tmp_path / "cls.pth.tar", tmp_path / "backbone.safetensors"):
        start = network(classes=5, seed=3)
        head = {key: value.clone() for key, value in start.classifier.state_dict().items()}
        report = load_pretrained(start, path)
        assert report.backbone_share == 1
        assert "(100.0 %)" in str(report)
        assert_same(start, average.state_dict(), "backbone.")
        assert all(torch.equal(value, head[key]) for key, value in start.classifier.state_dict().items())
    with pytest.raises(CheckpointError, match="ssaseg-backbone-1"):
        load_model(tmp_path / "backbone.safetensors")


def test_names_written_by_older_numpy(tmp_path: Path) -> None:
    """NumPy 1 wrote `numpy.core.multiarray`; a file of that age is read by NumPy 2, and the other way round."""
    torch.save({"model": official_state(network()), "metric": np.float64(1)}, tmp_path / "now.pth", pickle_protocol=2)
    legacy = tmp_path / "old.pth"
    torch.save(
        {"model": official_state(network()), "metric": np.float64(1)}, legacy, _use_new_zipfile_serialization=False
    )
    content = legacy.read_bytes()
    old, new = b"numpy._core.multiarray", b"numpy.core.multiarray"
    swapped = content.replace(old, new) if old in content else content.replace(new, old)
    assert swapped != content
    legacy.write_bytes(swapped)
    for path in (tmp_path / "now.pth", legacy):
        assert load_pretrained(network(seed=4), path).complete


def test_counters_may_be_absent(tmp_path: Path) -> None:
    model = network(classifier="linear")
    state = {key: value for key, value in official_state(model).items() if "num_batches_tracked" not in key}
    torch.save(state, tmp_path / "plain.pth")
    result = convert(tmp_path / "plain.pth", tmp_path / "ours.safetensors", "--model", "seaformer_t")
    assert result.exit_code == 0, result.output
    assert "11 without names" in result.output
    assert "(top level)" in result.output
    loaded, metadata = load_model(tmp_path / "ours.safetensors")
    assert metadata["classes"][10] == "class_10"
    assert torch.equal(loaded.classifier.conv_seg.weight, model.classifier.conv_seg.weight)


@pytest.mark.parametrize(
    ("classes", "words", "dataset"),
    [
        (150, [], "ade20k"),
        (59, ["--dataset", "pascal_context_59"], "pascal_context_59"),
        (171, ["--dataset", "coco_stuff"], "coco_stuff"),
    ],
)
def test_classes_palette_and_protocol(tmp_path: Path, classes: int, words: list[str], dataset: str) -> None:
    torch.save({"state_dict": official_state(network(classes, "linear"))}, tmp_path / "official.pth")
    result = convert(tmp_path / "official.pth", tmp_path / "ours.safetensors", *words)
    assert result.exit_code == 0, result.output
    metadata = load_model(tmp_path / "ours.safetensors")[1]
    assert {key: metadata[key] for key in ("classes", "palette", "protocol")} == label_space(dataset)._asdict()


def test_built_in_scenes_name_the_classes(tmp_path: Path) -> None:
    torch.save({"state_dict": official_state(network(13, "linear"))}, tmp_path / "official.pth")
    assert convert(tmp_path / "official.pth", tmp_path / "ours.safetensors", "--dataset", "demo").exit_code == 0
    metadata = load_model(tmp_path / "ours.safetensors")[1]
    assert (metadata["classes"][0], metadata["palette"][0]) == ("sky", [135, 206, 250])


def test_dataset_of_another_size_or_unknown(tmp_path: Path) -> None:
    torch.save({"state_dict": official_state(network(11, "linear"))}, tmp_path / "official.pth")
    recipe = convert(tmp_path / "official.pth", tmp_path / "ours.safetensors", "--dataset", "camvid-seaformer_b-linear")
    assert recipe.exit_code == 0, recipe.output
    assert load_model(tmp_path / "ours.safetensors")[1]["classes"][10] == "bicyclist"
    for dataset, message in (("ade20k", "has 150 classes"), ("cityscrapes", "expected one of: ade20k")):
        result = convert(tmp_path / "official.pth", tmp_path / "new.safetensors", "--dataset", dataset)
        assert (result.exit_code, message in result.output) == (2, True), result.output
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize("fault", ["missing", "unexpected", "wrong shape"])
def test_one_wrong_key_refuses_a_segmentation_checkpoint(tmp_path: Path, fault: str) -> None:
    """Named in the report, nothing written; `--allow-partial` goes on and says so by its exit code."""
    state = official_state(network(150))
    key = "backbone.smb2.layer1.conv.0.c.weight"
    if fault == "missing":
        del state[key]
    elif fault == "unexpected":
        key = "decode_head.something.weight"
        state[key] = torch.zeros(3)
    else:
        state[key] = state[key][:-1]
    torch.save({"state_dict": state}, tmp_path / "official.pth")
    words = [tmp_path / "official.pth", tmp_path / "out" / "ours.safetensors", "--model", "seaformer_t"]
    result = convert(*words)
    assert result.exit_code == 2
    assert f"{fault:12} 1: {key}" in result.output
    assert "does not fit seaformer_t with ssa" in result.output
    assert not (tmp_path / "out").exists()
    assert convert(*words, "--allow-partial").exit_code == 1
    assert load_model(tmp_path / "out" / "ours.safetensors")[1]["model"] == "seaformer_t"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("inf"), "has 1 of 7 values that are NaN or infinite"),
        (None, "torch.int64, expected torch.float32"),
    ],
)
def test_weights_that_are_no_numbers(tmp_path: Path, value: float | None, message: str) -> None:
    state = official_state(network(classes=7))
    key = "decode_head.conv_seg.bias"
    state[key] = torch.arange(7) if value is None else state[key].index_fill(0, torch.tensor([3]), value)
    torch.save({"state_dict": state}, tmp_path / "odd.pth")
    result = convert(tmp_path / "odd.pth", tmp_path / "ours.safetensors")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 3 if value is None else 2), result.output
    assert f"{key} {message}" in result.stderr
    assert not (tmp_path / "ours.safetensors").exists()


def test_half_precision_is_taken(tmp_path: Path) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in official_state(network(classes=7)).items()}
    torch.save({"state_dict": state}, tmp_path / "half.pth")
    assert convert(tmp_path / "half.pth", tmp_path / "ours.safetensors").exit_code == 0
    loaded = load_model(tmp_path / "ours.safetensors")[0]
    assert torch.equal(loaded.classifier.conv_seg.bias, state["decode_head.conv_seg.bias"].float())


def test_class_names_of_another_count_are_left(tmp_path: Path) -> None:
    content = {"state_dict": official_state(network(classes=7)), "meta": {"CLASSES": ["a", "b"]}}
    torch.save(content, tmp_path / "official.pth")
    result = convert(tmp_path / "official.pth", tmp_path / "ours.safetensors")
    said = "the file names 2, but its head has 7: the names are not used" in result.output
    assert (result.exit_code, said) == (0, True)


def test_backbone_share_is_enforced(tmp_path: Path) -> None:
    """A pre-trained file may lack 5 % of the backbone's tensors, not more."""
    state = imagenet_state(network())
    keys = [key for key in state if not key.endswith("num_batches_tracked") and not key.startswith("linear.")]
    for share, code in ((0.04, 1), (0.06, 2)):
        few = {key: value for key, value in state.items() if key not in keys[: int(share * len(keys))]}
        torch.save(few, tmp_path / "few.pth")
        result = convert(tmp_path / "few.pth", tmp_path / f"{share}.safetensors", "--model", "seaformer_t")
        assert result.exit_code == code, result.output
        assert (tmp_path / f"{share}.safetensors").exists() == (code == 1)
    start = network(seed=5)
    before = {key: value.clone() for key, value in start.state_dict().items()}
    with pytest.raises(Exception, match="expected at least 95 %"):
        load_pretrained(start, tmp_path / "few.pth")
    assert_same(start, before)


def test_wrong_model_or_classifier_is_told(tmp_path: Path) -> None:
    torch.save({"state_dict": official_state(network(150))}, tmp_path / "ssa.pth")
    torch.save({"state_dict": official_state(network(150, "linear"))}, tmp_path / "linear.pth")
    cases: list[tuple[list[str], str]] = [
        (["ssa.pth", "--model", "seaformer_s"], "use --model seaformer_t"),
        (["ssa.pth", "--model", "resnet"], "expected one of: afformer_b, "),
        (["ssa.pth", "--model", "seaformer_t", "--classifier", "linear"], "use --classifier ssa"),
        (["linear.pth", "--model", "seaformer_t", "--classifier", "ssa"], "use --classifier linear"),
    ]
    for (source, *words), message in cases:
        result = convert(tmp_path / source, tmp_path / "ours.safetensors", *words)
        assert (result.exit_code, message in result.output) == (2, True), result.output
    assert not (tmp_path / "ours.safetensors").exists()
    with pytest.raises(Exception, match="look like seaformer_t"):
        load_pretrained(network(name="seaformer_s"), tmp_path / "ssa.pth")


@pytest.mark.parametrize("classifier", ["protoseg", "gmmseg", "dnc"])
def test_what_no_other_program_reads_is_not_written(tmp_path: Path, classifier: str) -> None:
    save_model(tmp_path / "ours.safetensors", network(3, classifier), {})
    result = convert(tmp_path / "ours.safetensors", tmp_path / "official.pth")
    assert result.exit_code == 2
    assert f"no other program reads a seaformer_t with {classifier}" in result.output
    assert not (tmp_path / "official.pth").exists()


@pytest.mark.parametrize("options", [{"components": 2, "width": 8, "memory": 20}, {"components": 3, "memory": 30}])
def test_new_classes_keep_the_options(tmp_path: Path, options: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = build_model("seaformer_t", 3, "gmmseg", options=options)
    save_model(tmp_path / "ours.safetensors", model, {"classes": ["sky", "road", "car"]})
    result = convert(tmp_path / "ours.safetensors", tmp_path / "two.safetensors", "--classes", "car,lake")
    assert result.exit_code == 0, result.output
    found, _ = load_model(tmp_path / "two.safetensors")
    assert found.options == options
    assert torch.equal(found.classifier.means[0], model.classifier.means[2])


@pytest.mark.parametrize("classifier", ["linear", "ssa", "cac"])
def test_round_trip_is_bit_equal(tmp_path: Path, classifier: str) -> None:
    """Ours to official names and back: every tensor, classes and palette; what is left out is listed."""
    model = network(3, classifier)
    metadata = {"classes": ["a", "b", "c"], "palette": [[0, 0, 0], [1, 2, 3], [255, 255, 255]]}
    save_model(tmp_path / "ours.safetensors", model, metadata)
    out = convert(tmp_path / "ours.safetensors", tmp_path / "official.pth")
    assert out.exit_code == 0, out.output
    assert all(f"decode_head.{key}" in out.output for key in CLASSIFIERS[classifier].LEFT_OUT)
    content = torch.load(tmp_path / "official.pth", weights_only=True)
    assert content["meta"] == {"CLASSES": metadata["classes"], "PALETTE": metadata["palette"]}
    expected = official_state(model)
    assert content["state_dict"].keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in content["state_dict"].items())
    back = convert(tmp_path / "official.pth", tmp_path / "back.safetensors", "--model", "seaformer_t")
    assert back.exit_code == 0, back.output
    loaded, found = load_model(tmp_path / "back.safetensors")
    assert_same(loaded, model.state_dict())
    assert {key: found[key] for key in metadata} == metadata


def test_official_names_in_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = network(150)
    save_file(official_state(model), tmp_path / "official.safetensors", {"format": "pt"})
    result = convert(tmp_path / "official.safetensors", tmp_path / "ours.safetensors")
    assert result.exit_code == 0, result.output
    assert_same(load_model(tmp_path / "ours.safetensors")[0], model.state_dict())


def test_start_from_another_number_of_classes(tmp_path: Path) -> None:
    """Backbone, decoder and what of the classifier does not depend on classes; class rows stay as they were."""
    source = network(150)
    torch.save({"state_dict": official_state(source)}, tmp_path / "official.pth")
    save_model(tmp_path / "ours.safetensors", source, {})
    for path in (tmp_path / "official.pth", tmp_path / "ours.safetensors"):
        start = network(11, seed=6)
        rows = start.classifier.conv_seg.weight.clone()
        report = load_pretrained(start, path)
        assert "the file has 150 classes, the model 11" in str(report)
        assert len(report.fresh) == 3  # conv_seg's weight and bias, the table of spatial prototypes
        assert_same(start, source.state_dict(), "backbone.")
        assert_same(start, source.state_dict(), "decoder.")
        assert_same(start, source.state_dict(), "classifier.teacher.")
        assert torch.equal(start.classifier.conv_seg.weight, rows)


class Bomb:
    """Unpickles into a call that leaves a trace."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", ["system", "eval", "class"])
def test_malicious_pickle_runs_nothing(tmp_path: Path, zipped: bool, function: str) -> None:
    trace = tmp_path / "trace"
    bomb, name = {
        "system": (Bomb(os.system, f"touch {trace}"), os.system.__module__ + ".system"),
        "eval": (Bomb(eval, f"open({str(trace)!r}, 'w')"), "eval"),
        "class": (Bomb(Path), "Path"),
    }[function]
    content = {"state_dict": official_state(network()), "meta": {"hooks": [bomb]}}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    result = convert(tmp_path / "evil.pth", tmp_path / "ours.safetensors", "--model", "seaformer_t")
    assert result.exit_code == 2
    assert name in result.output
    assert "refused" in result.output
    assert not trace.exists()
    assert not (tmp_path / "ours.safetensors").exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_of_any_protocol_is_refused_by_the_name_of_its_type(tmp_path: Path, protocol: int) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    path.write_bytes(pickle.dumps({"state_dict": Bomb(os.system, f"touch {trace}")}, protocol))
    with pytest.raises(CommandError, match=rf"model\.pretrained=.*evil\.pth: holds a {os.system.__module__}\.system"):
        load_pretrained(network(), path)
    assert not trace.exists()


def test_pretrained_errors_name_the_key(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.pretrained=.*gone\.pth: no such"):
        load_pretrained(network(), tmp_path / "gone.pth")
    (tmp_path / "photo.pth").write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256)))
    with pytest.raises(CommandError, match=r"model\.pretrained=.*is not a PyTorch checkpoint, or is truncated"):
        load_pretrained(network(), tmp_path / "photo.pth")


def test_the_bomb_is_live(tmp_path: Path) -> None:
    """The test above can fail: the same pickle, read without restriction, leaves its trace."""
    pickle.loads(pickle.dumps(Bomb(os.system, f"touch {tmp_path / 'trace'}")))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "ours.safetensors", "text.pth", "empty.pth", "list.pth"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    state = {"state_dict": official_state(network())}
    if name == "ours.safetensors":
        save_model(path, network(), {})
    elif name in ("zip.pth", "legacy.pth"):
        torch.save(state, path, _use_new_zipfile_serialization=name == "zip.pth")
    else:
        path.write_bytes({"text.pth": b"<html>404</html>", "empty.pth": b"", "list.pth": pickle.dumps([1], 2)}[name])
    if name in ("zip.pth", "legacy.pth", "ours.safetensors"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = convert(path, tmp_path / "new.safetensors", "--model", "seaformer_t")
    assert result.exit_code == 2, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith(f"error: {path}: ")
    assert len(lines) <= 3
    assert not (tmp_path / "new.safetensors").exists()


def test_destinations_that_make_no_sense(tmp_path: Path) -> None:
    save_model(tmp_path / "ours.safetensors", network(), {})
    torch.save({"state_dict": official_state(network())}, tmp_path / "official.pth")
    cases = [
        ("ours.safetensors", "x.txt", "expected .safetensors (ssaseg's format), .pth"),
        ("ours.safetensors", "x.safetensors", "is already a file of ssaseg"),
        ("ours.safetensors", "ours.safetensors", "the same file"),
        ("official.pth", "x.pth", "convert it first: ssaseg convert"),
        ("official.pth", "x.onnx", "convert it first: ssaseg convert"),
    ]
    for source, destination, message in cases:
        result = convert(tmp_path / source, tmp_path / destination)
        assert (result.exit_code, message in result.output) == (2, True), result.output
    wrong = convert(tmp_path / "ours.safetensors", tmp_path / "x.pth", "--classifier", "linear")
    assert (wrong.exit_code, "its header says ssa" in wrong.output) == (2, True)
    wrong = convert(tmp_path / "ours.safetensors", tmp_path / "x.pth", "--dataset", "ade20k")
    assert (wrong.exit_code, "--dataset: only for official weights" in wrong.output) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["official.pth", "ours.safetensors"]
