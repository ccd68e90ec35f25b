"""`convert` on what each family's checkpoints look like, and head rows that follow class names.

Official files are made here from the official key lists in `golden/`; what only those files hold comes from there too.
"""

import re
import sys
import types
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from converting import convert, done
from places import GOLDEN
from torch import Tensor

from ssaseg.cli.weights.classes import rows_by_name
from ssaseg.cli.weights.foreign import Weights, read_weights
from ssaseg.cli.weights.matching import likely_model, outline
from ssaseg.cli.weights.pretrained import load_pretrained
from ssaseg.datasets.labels import label_space
from ssaseg.models import Segmenter, build_model, list_models, load_model, save_model
from ssaseg.models.build import build_outline
from ssaseg.models.official import canonical, left_out, official_entries

CAMVID = "camvid-seaformer_b-ssa"


def network(name: str, classes: int = 3, classifier: str = "linear", seed: int = 1) -> Segmenter:
    """A network in which no tensor has the value of a fresh one."""
    torch.manual_seed(seed)
    model = build_model(name, classes, classifier)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(torch.rand_like(value) * 0.1 if value.is_floating_point() else 7)
    return model


def official_state(model: Segmenter) -> dict[str, Tensor]:
    state = model.state_dict()
    given = {name: value for entry in official_entries(model) for name, value in entry.give(state).items()}
    return {name: value.clone().contiguous() for name, value in given.items()}


def bare_backbone(model: Segmenter) -> dict[str, Tensor]:
    """As in an ImageNet file, without its classifier."""
    official = official_state(model).items()
    return {key.removeprefix("backbone."): value for key, value in official if key.startswith("backbone.")}


def official_file(name: str, classifier: str) -> dict[str, Tensor]:
    """A state dict with the keys and shapes of the official code's; names of one tensor hold one tensor."""
    seeded = torch.Generator().manual_seed(5)
    made: dict[str, Tensor] = {}
    state = {}
    for line in (GOLDEN / f"{name}_keys.txt").read_text().splitlines():
        kind, key, shape, dtype = line.split()
        if kind in ("both", classifier):
            sizes = [int(size) for size in re.findall(r"\d+", shape)]
            draw = torch.randint(0, 1000, sizes, generator=seeded).to(getattr(torch, dtype))
            state[key] = made.setdefault(canonical(key), draw)
    return state


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        *((name, "ssa") for name in ("afformer_base", "cgrseg_b", "seaformer_base", "segnext_tiny")),
        ("seaformer_base", "linear"),
        *(
            pytest.param(name, "linear", marks=pytest.mark.slow)
            for name in ("afformer_base", "cgrseg_b", "segnext_tiny")
        ),
    ],
)
def test_official_file_there_and_back(tmp_path: Path, name: str, classifier: str) -> None:
    """Network and classifier are recognised; all that ours holds comes back bit for bit, the rest is named."""
    state = official_file(name, classifier)
    torch.save({"state_dict": state, "meta": {"CLASSES": ["x"]}}, tmp_path / "official.pth")
    output = done(tmp_path / "official.pth", tmp_path / "ours.safetensors")
    family, _, size = name.partition("_")
    assert f"read as {family}_{size[0]}, {classifier}, 150 classes" in output
    assert "missing      0" in output
    back = done(tmp_path / "ours.safetensors", tmp_path / "back.pth")
    returned = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[key]) and value.is_contiguous() for key, value in returned.items())
    lacking = [key for key in state if key not in returned]
    patterns = left_out(load_model(tmp_path / "ours.safetensors")[0])
    assert all(any(fnmatchcase(key, pattern) for pattern in patterns) for key in lacking)
    assert f"not used     {len(lacking)}" in output
    assert all(pattern in back for pattern in patterns)
    assert len(lacking) == {"afformer": 3, "cgrseg": 27}.get(family, 0) + (classifier == "ssa")


def test_afformer_files_hold_shared_tensors_once(tmp_path: Path) -> None:
    """Exported under all names, each name the same memory; any one name will do to read them."""
    model = network("afformer_t")
    save_model(tmp_path / "ours.safetensors", model, {})
    done(tmp_path / "ours.safetensors", tmp_path / "official.pth")
    state = torch.load(tmp_path / "official.pth", weights_only=True)["state_dict"]
    names = [key for key in state if key != canonical(key)]
    assert len(names) == (2 + 4 + 2) * (2 + 2 * 6)  # layers · (position encoding + twice three filters), with biases
    assert all(state[key].data_ptr() == state[canonical(key)].data_ptr() for key in names)
    single = {key: value for key, value in state.items() if "MHCA_layers.1.factoratt_crpe.crpe" in key}
    single |= {key: value for key, value in state.items() if "MHCA_layers.0.cpe" in key}
    others = {key: value for key, value in state.items() if canonical(key) not in map(canonical, single)}
    torch.save({"state_dict": others | single}, tmp_path / "single.pth")
    done(tmp_path / "single.pth", tmp_path / "again.safetensors")
    again = load_model(tmp_path / "again.safetensors")[0].state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())


def test_two_values_of_one_tensor_are_refused(tmp_path: Path) -> None:
    state = official_file("afformer_base", "linear")
    first, second = (f"backbone.mhca_stages.1.mhca_blks.0.{layer}cpe.proj.bias" for layer in ("", "MHCA_layers.1."))
    state[second] = state[second] + 1
    torch.save({"state_dict": state}, tmp_path / "odd.pth")
    result = convert(tmp_path / "odd.pth", tmp_path / "ours.safetensors")
    assert (result.exit_code, len(result.output.splitlines())) == (2, 2)
    assert f"{first} and {second} differ" in result.output
    assert not (tmp_path / "ours.safetensors").exists()


@pytest.mark.slow
def test_every_network_is_recognised_by_keys_and_shapes() -> None:
    """Also where one backbone's tensors are part of another's: SegNeXt-B's are all in SegNeXt-L's."""
    for name in list_models():
        model = outline(name)
        assert likely_model(Weights(official_state(model), "")) == (name, 1.0)
        bare = {f"backbone.{key}": value for key, value in bare_backbone(model).items() if "biases_seg" not in key}
        assert likely_model(Weights(bare, "")) == (name, 1.0)
    assert likely_model(Weights({"backbone.conv1.weight": torch.zeros(1)}, "")) == ("", 0.0)


def test_deeper_network_is_no_start_for_a_shallower_one(tmp_path: Path) -> None:
    """SegNeXt-S's backbone fits into SegNeXt-B's file whole, and is another one all the same."""
    torch.save({"state_dict": official_state(network("segnext_b"))}, tmp_path / "b.pth")
    with pytest.raises(Exception, match="look like segnext_b"):
        load_pretrained(network("segnext_s"), tmp_path / "b.pth")


# ---- mmsegmentation 1.x ------------------------------------------------------------------------------------------


def newer_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("mlp.dwconv.dwconv.", "mlp.dwconv."): value for key, value in state.items()}


class HistoryBuffer:
    """Stands where mmengine has the curves of a run: arrays, and methods of its own by name."""

    def __init__(self) -> None:
        self.values = np.array([0.5, 0.25])
        self.methods = {"mean": HistoryBuffer.mean}

    def mean(self) -> None:
        """Pickled by a `getattr`."""


def test_mmengine_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer key names, classes in `dataset_meta`, curves as objects: read where no mmengine is."""
    model = network("segnext_t")
    classes = {"classes": ("road", "sky", "car"), "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}
    content = {
        "meta": {"cfg": "model = ...", "dataset_meta": classes, "mmengine_version": "0.10.7"},
        "state_dict": newer_names(official_state(model)),
        "message_hub": {"log_scalars": {"train/loss": HistoryBuffer()}, "runtime_info": {"eta": np.float64(1)}},
        "ema_state_dict": {"steps": torch.tensor(3)},
    }
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    monkeypatch.setattr(HistoryBuffer, "__module__", module.__name__)
    monkeypatch.setattr(HistoryBuffer.mean, "__module__", module.__name__)
    with monkeypatch.context() as patch:
        for name in ("mmengine", "mmengine.logging"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save(content, tmp_path / "newer.pth")
    assert b"getattr" in (tmp_path / "newer.pth").read_bytes()
    assert "read as segnext_t, linear, 3 classes" in done(tmp_path / "newer.pth", tmp_path / "ours.safetensors")
    loaded, metadata = load_model(tmp_path / "ours.safetensors")
    assert (metadata["classes"], metadata["palette"]) == (list(classes["classes"]), classes["palette"])
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


class Reach:
    """Unpickles into a `getattr` whose result is called."""

    def __reduce__(self) -> Any:
        return getattr, (Path, "home")


def test_getattr_in_a_pickle_finds_nothing(tmp_path: Path) -> None:
    """It is let in for mmengine's sake, by a function that returns None; what it reaches for is refused by name."""
    torch.save({"state_dict": bare_backbone(network("segnext_t")), "meta": {"x": Reach()}}, tmp_path / "reach.pth")
    result = convert(tmp_path / "reach.pth", tmp_path / "ours.safetensors")
    assert (result.exit_code, "Path, which is refused" in result.output) == (2, True), result.output


# ---- ImageNet checkpoints ----------------------------------------------------------------------------------------


def imagenet_file(kind: str) -> tuple[Segmenter, dict[str, Any], int]:
    """(network, file, number of its tensors that are of no use) as the authors publish them."""
    rows, counter = torch.rand(1000, 4), torch.zeros((), dtype=torch.long)
    if kind.startswith("mscan"):
        model = network("segnext_t")
        state = bare_backbone(model) | {"head.weight": rows, "head.bias": rows[:, 0]}
        return model, {"state_dict": newer_names(state) if kind == "mscan of mmseg" else state}, 2
    if kind == "afformer":
        model = network("afformer_t")
        return model, {"state_dict": bare_backbone(model) | {"cls_head.cls.weight": rows}}, 1
    model = network("cgrseg_t")
    state = bare_backbone(model)
    tables = [key for key in state if key.endswith("attention_biases_seg")]
    for table in tables:
        keys = 196 if state.pop(table).shape[1] == 1024 else 49
        state[table.removesuffix("_seg")] = torch.rand(8, keys)
        state[table.replace("biases_seg", "bias_idxs")] = torch.zeros(49, keys, dtype=torch.long)
    state |= {f"{part}.{leaf}": rows for part in ("norm", "head", "dist_head") for leaf in ("weight", "bias")}
    return model, {"model": state | {"norm.running_mean": rows, "norm.num_batches_tracked": counter}}, 7 + 10


@pytest.mark.parametrize("kind", ["mscan", "mscan of mmseg", "afformer", "efficientformer"])
def test_imagenet_file_is_complete(tmp_path: Path, kind: str) -> None:
    """Recognised, all of it taken; the network's own tables, which it cannot have, stay as they were, and are named."""
    source, content, useless = imagenet_file(kind)
    torch.save(content, tmp_path / "imagenet.pth")
    output = done(tmp_path / "imagenet.pth", tmp_path / "backbone.safetensors")
    assert f"read as {source.name}, only the backbone" in output
    assert f"not used     {useless}: " in output
    assert ("new weights  5: backbone.network.4.7.token_mixer.attention_biases_seg" in output) == (
        kind == "efficientformer"
    )
    for path in (tmp_path / "imagenet.pth", tmp_path / "backbone.safetensors"):
        start = network(source.name, seed=2)
        before = {key: value.clone() for key, value in start.state_dict().items()}
        pretrained = source.state_dict()
        report = load_pretrained(start, path)
        assert (report.complete, report.backbone_share) == (True, 1.0)
        for key, value in start.state_dict().items():
            kept = not key.startswith("backbone.") or key.endswith("bias.table")
            assert torch.equal(value, before[key] if kept else pretrained[key]), key


def test_a_whole_network_needs_its_tables(tmp_path: Path) -> None:
    """Only an ImageNet file may lack the biases: with a head beside it, a file without them is damaged."""
    state = {key: value for key, value in official_state(network("cgrseg_t")).items() if "5.attn.attention" not in key}
    torch.save({"state_dict": state}, tmp_path / "official.pth")
    result = convert(tmp_path / "official.pth", tmp_path / "ours.safetensors", "--model", "cgrseg_t")
    assert result.exit_code == 2
    assert "missing      1: backbone.network.5.attn.attention_biases_seg" in result.output


# ---- rows that follow class names --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "wanted", "rows"),
    [
        (["sky", "Road", "car"], ["CAR", "road", "lake"], [2, 1, None]),
        (["car;auto", "building, edifice", "tree"], ["auto", "edifice", "car", "tree"], [0, 1, 0, 2]),
        (["door;screen door", "screen;screen door"], ["screen door", "screen"], [None, 1]),  # two could be meant
        (["car;auto", "car"], ["car", "auto"], [1, 0]),  # the whole name goes first
        (["sidewalk"], ["side"], [None]),
    ],
)
def test_rows_by_name(source: list[str], wanted: list[str], rows: list[int | None]) -> None:
    assert rows_by_name(source, wanted) == rows


def test_class_rows_are_all_that_depends_on_the_number_of_classes() -> None:
    for name in ("afformer_t", "cgrseg_t", "seaformer_t", "segnext_t"):
        for classifier, number in (("linear", 2), ("ssa", 3), ("cac", 2), ("protoseg", 3), ("gmmseg", 4), ("dnc", 3)):
            small, large = (build_outline(name, classes, classifier, memory=False) for classes in (3, 4))
            few, many = small.state_dict(), large.state_dict()
            changed = {key for key in few if few[key].shape != many[key].shape}
            assert changed == set(small.class_rows())
            assert len(changed) == number


@pytest.mark.parametrize("kind", ["official", "ours"])
def test_ade20k_head_for_camvid(tmp_path: Path, kind: str) -> None:
    """Rows of the classes that both know are ADE20K's, in CamVid's order; palette and sizes are CamVid's."""
    model, ade = network("segnext_t", 150, "ssa"), list(label_space("ade20k").classes)
    if kind == "ours":
        metadata = {**label_space("ade20k")._asdict(), "step": 9, "scores": {"miou": 41.0}}
        save_model(tmp_path / "ade.safetensors", model, metadata)
        source = tmp_path / "ade.safetensors"
    else:
        source = tmp_path / "ade.pth"
        torch.save({"state_dict": official_state(model)}, source)
    output = done(source, tmp_path / "mine.safetensors", "--classes", CAMVID)
    mine, metadata = load_model(tmp_path / "mine.safetensors")
    kept = [name for name in metadata["classes"] if name in ade]
    assert (len(metadata["classes"]), "sky" in kept, "bicyclist" in kept) == (11, True, False)
    assert f"rows kept    {len(kept)}: {', '.join(kept)}\n" in output
    assert f"rows new     {11 - len(kept)}: " in output
    assert metadata["palette"][0] == [128, 128, 128]
    assert (metadata["step"], metadata["scores"]) == (0, {})
    before, rows = model.state_dict(), mine.class_rows()
    for key, value in mine.state_dict().items():
        if key not in rows:
            assert torch.equal(value, before[key]), key
            continue
        for k, name in enumerate(metadata["classes"]):
            same = [bool(torch.equal(value[k], row)) for row in before[key]]
            assert [j for j, equal in enumerate(same) if equal] == ([ade.index(name)] if name in ade else [])


def test_classes_by_name_on_the_command_line(tmp_path: Path) -> None:
    """The same number of other classes is mapped too; where no name is known, that is a warning."""
    model = network("afformer_t")
    save_model(tmp_path / "a.safetensors", model, {"classes": ["sky", "road", "car"], "mean": [1.0, 2.0, 3.0]})
    output = done(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--classes", "Car, lake,sky")
    assert "rows kept    2: Car (car), sky" in output
    weight = load_model(tmp_path / "b.safetensors")[0].classifier.conv_seg.weight
    old = model.classifier.conv_seg.weight
    assert torch.equal(weight[[0, 2]], old[[2, 0]])
    assert not torch.equal(weight[1], old[1])
    assert load_model(tmp_path / "b.safetensors")[1]["mean"] == [1.0, 2.0, 3.0]
    none = convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "--classes", "lake,tree")
    assert (none.exit_code, "no class has the same name" in none.output) == (1, True)


def test_classes_that_make_no_sense(tmp_path: Path) -> None:
    model = network("segnext_t")
    save_model(tmp_path / "ours.safetensors", model, {})
    torch.save({"state_dict": official_state(model)}, tmp_path / "official.pth")
    torch.save({"state_dict": bare_backbone(model)}, tmp_path / "imagenet.pth")
    cases = [
        ("ours.safetensors", "x.pth", CAMVID, "--classes: only for .safetensors"),
        ("ours.safetensors", "x.safetensors", "kitti", "--classes kitti: no such data set"),
        ("ours.safetensors", "x.safetensors", "sky,Sky", "empty or given twice"),
        ("official.pth", "x.safetensors", CAMVID, "give their names with --dataset"),
        ("imagenet.pth", "x.safetensors", CAMVID, "holds only a backbone"),
    ]
    for source, destination, classes, message in cases:
        result = convert(tmp_path / source, tmp_path / destination, "--classes", classes)
        assert (result.exit_code, message in result.output) == (2, True), result.output
        assert not (tmp_path / destination).exists()


def test_read_weights_counts_each_tensor_once(tmp_path: Path) -> None:
    torch.save({"state_dict": official_file("afformer_base", "ssa")}, tmp_path / "official.pth")
    assert len(read_weights(tmp_path / "official.pth").tensors) == 494 - 140
