"""Backbones as other programs save them: each file is described here by its own names, and computed here on its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from converting import convert
from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.cli.errors import CommandError
from ssaseg.cli.weights.foreign import read_weights
from ssaseg.cli.weights.matching import Match, match, outline
from ssaseg.cli.weights.pretrained import load_pretrained
from ssaseg.models import build_model
from ssaseg.models.networks import segformer, swin
from ssaseg.models.networks.resnet import Bottleneck
from ssaseg.models.official import official_keys

State = dict[str, Tensor]
FILES = ("file.pth", "ours.safetensors")


def draws(shapes: dict[str, Sequence[int]]) -> State:
    torch.manual_seed(5)
    return {key: torch.randn(*shape) * 0.1 + 0.5 for key, shape in shapes.items()}


def norm(key: str, width: int, batch: bool = True) -> dict[str, Sequence[int]]:
    return {f"{key}.{leaf}": (width,) for leaf in ("weight", "bias", *(("running_mean", "running_var") * batch))}


def linear(key: str, inputs: int, outputs: int) -> dict[str, Sequence[int]]:
    return {f"{key}.weight": (outputs, inputs), f"{key}.bias": (outputs,)}


def resnet(stem: dict[str, Sequence[int]], depths: Sequence[int] = (3, 4, 6, 3)) -> State:
    shapes, inputs = {**stem, **linear("fc", 2048, 10)}, 64
    for layer, depth in enumerate(depths):
        width = 64 * 2**layer
        for k in range(depth):
            for conv, (a, b, size) in enumerate(((inputs, width, 1), (width, width, 3), (width, 4 * width, 1))):
                shapes |= {f"layer{layer + 1}.{k}.conv{conv + 1}.weight": (b, a, size, size)}
                shapes |= norm(f"layer{layer + 1}.{k}.bn{conv + 1}", b)
            if k == 0:
                shapes |= {f"layer{layer + 1}.0.downsample.0.weight": (4 * width, inputs, 1, 1)}
                shapes |= norm(f"layer{layer + 1}.0.downsample.1", 4 * width)
            inputs = 4 * width
    return draws(shapes)


def deep_stem(names: Sequence[str]) -> dict[str, Sequence[int]]:
    shapes: dict[str, Sequence[int]] = {}
    for k, (a, b) in enumerate(((3, 32), (32, 32), (32, 64))):
        shapes |= {f"{names[2 * k]}.weight": (b, a, 3, 3)} | norm(names[2 * k + 1], b)
    return shapes


MMCLS = deep_stem([f"stem.{k}" for k in (0, 1, 3, 4, 6, 7)])
TIMM_C = deep_stem(["conv1.0", "conv1.1", "conv1.3", "conv1.4", "conv1.6", "bn1"])
TORCHVISION = {"conv1.weight": (64, 3, 7, 7)} | norm("bn1", 64)


def swin_file(kind: str, depths: Sequence[int] = (2, 2, 6, 2), window: int = 7) -> State:
    head = "head.fc" if kind == "timm" else "head"
    shapes = {"patch_embed.proj.weight": (96, 3, 4, 4), "patch_embed.proj.bias": (96,), **linear(head, 768, 10)}
    shapes |= norm("patch_embed.norm", 96, False) | norm("norm", 768, False)
    for layer, depth in enumerate(depths):
        width = 96 * 2**layer
        for k in range(depth):
            at = f"layers.{layer}.blocks.{k}"
            shapes |= norm(f"{at}.norm1", width, False) | norm(f"{at}.norm2", width, False)
            shapes |= linear(f"{at}.attn.qkv", width, 3 * width) | linear(f"{at}.attn.proj", width, width)
            shapes |= linear(f"{at}.mlp.fc1", width, 4 * width) | linear(f"{at}.mlp.fc2", 4 * width, width)
            shapes[f"{at}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, width // 32)
            if kind == "official":
                shapes[f"{at}.attn.relative_position_index"] = (49, 49)
                shapes |= {f"{at}.attn_mask": (4, 49, 49)} if k % 2 and layer < 3 else {}
        if layer < 3:
            at = f"layers.{layer + (kind == 'timm')}.downsample"
            shapes |= norm(f"{at}.norm", 4 * width, False) | {f"{at}.reduction.weight": (2 * width, 4 * width)}
    return draws(shapes)


def mit_file(depths: Sequence[int] = (2, 2, 2, 2)) -> State:
    shapes, inputs = linear("head", 256, 10), 3
    for stage, width in enumerate((32, 64, 160, 256)):
        patch, n = (3, 3) if stage else (7, 7), stage + 1
        shapes |= {f"patch_embed{n}.proj.weight": (width, inputs, *patch), f"patch_embed{n}.proj.bias": (width,)}
        shapes |= norm(f"patch_embed{n}.norm", width, False) | norm(f"norm{n}", width, False)
        for k in range(depths[stage]):
            at, side = f"block{n}.{k}", (8, 4, 2, 1)[stage]
            shapes |= norm(f"{at}.norm1", width, False) | norm(f"{at}.norm2", width, False)
            shapes |= linear(f"{at}.attn.q", width, width) | linear(f"{at}.attn.kv", width, 2 * width)
            shapes |= linear(f"{at}.attn.proj", width, width)
            shapes |= linear(f"{at}.mlp.fc1", width, 4 * width) | linear(f"{at}.mlp.fc2", 4 * width, width)
            shapes |= {
                f"{at}.mlp.dwconv.dwconv.weight": (4 * width, 1, 3, 3),
                f"{at}.mlp.dwconv.dwconv.bias": (4 * width,),
            }
            if side > 1:
                shapes |= {f"{at}.attn.sr.weight": (width, width, side, side), f"{at}.attn.sr.bias": (width,)}
                shapes |= norm(f"{at}.attn.norm", width, False)
        inputs = width
    return draws(shapes)


def vit_file(width: int = 192, positions: int = 197, distilled: bool = False) -> State:
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, positions, width), **linear("head", width, 10)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    shapes |= norm("norm", width, False)
    if distilled:
        shapes |= {"dist_token": (1, 1, width), **linear("head_dist", width, 10)}
    for k in range(12):
        at = f"blocks.{k}"
        shapes |= norm(f"{at}.norm1", width, False) | norm(f"{at}.norm2", width, False)
        shapes |= linear(f"{at}.attn.qkv", width, 3 * width) | linear(f"{at}.attn.proj", width, width)
        shapes |= linear(f"{at}.mlp.fc1", width, 4 * width) | linear(f"{at}.mlp.fc2", 4 * width, width)
    return draws(shapes)


def converted(folder: Path, state: State, name: str) -> tuple[State, Match, str]:
    """Tensors of a backbone by our keys, the same from the file as from its conversion; the text of `convert`."""
    torch.save({"model": state}, folder / "file.pth")
    done = convert(folder / "file.pth", folder / "ours.safetensors")
    assert done.exit_code == 0, done.output
    assert f"read as {name}, only the backbone" in done.output
    (report, tensors), (again, same) = (match(outline(name), read_weights(folder / each)) for each in FILES)
    assert all((each.complete, each.backbone_share) == (True, 1.0) for each in (report, again))
    assert tensors.keys() == same.keys()
    assert all(torch.equal(value, same[key]) for key, value in tensors.items())
    return tensors, report, done.output


def loaded(module: nn.Module, tensors: State, prefix: str) -> nn.Module:
    """A part of a network with its tensors, for evaluation."""
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    module.load_state_dict(own, strict=False)
    assert {key for key in module.state_dict() if "num_batches" not in key} == own.keys()
    return module.eval()


def bottleneck(state: State, at: str, x: Tensor, stride: int, dilation: int) -> Tensor:
    def step(conv: str, bn: str, x: Tensor, **how: Any) -> Tensor:
        own = (state[f"{bn}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(F.conv2d(x, state[f"{conv}.weight"], **how), *own)

    y = step(f"{at}.conv1", f"{at}.bn1", x).relu()
    y = step(f"{at}.conv2", f"{at}.bn2", y, stride=stride, dilation=dilation, padding=dilation).relu()
    return (
        step(f"{at}.conv3", f"{at}.bn3", y) + step(f"{at}.downsample.0", f"{at}.downsample.1", x, stride=stride)
    ).relu()


@pytest.mark.parametrize("kind", ["mmcls", "timm", "torchvision"])
def test_resnet(tmp_path: Path, kind: str) -> None:
    state = resnet({"mmcls": MMCLS, "timm": TIMM_C, "torchvision": TORCHVISION}[kind])
    tensors, report, text = converted(tmp_path, state, "fcn_r50")
    assert report.not_used[-2:] == ["fc.weight", "fc.bias"]
    if kind == "torchvision":
        assert len(report.fresh) == 15
        assert all(key.startswith("backbone.stem.") for key in report.fresh)
        assert not any(key.startswith("backbone.stem.") for key in tensors)
        assert "  note         not ResNet v1c: its stem, one 7×7 convolution, is not used; three 3×3" in text
        assert len(report.not_used) == 7
    else:
        assert not report.fresh
        last = {"mmcls": ("stem.6", "stem.7"), "timm": ("conv1.6", "bn1")}[kind]
        assert torch.equal(tensors["backbone.stem.4.conv.weight"], state[f"{last[0]}.weight"])
        assert torch.equal(tensors["backbone.stem.4.norm.running_var"], state[f"{last[1]}.running_var"])
    x = torch.rand(1, 256, 6, 6)
    block = loaded(Bottleneck(256, 128, 2, 1), tensors, "backbone.stages.1.0.")
    torch.testing.assert_close(block(x), bottleneck(state, "layer2.0", x, 2, 1))


def merged(x: Tensor, state: State, at: str) -> Tensor:
    """The authors' patch merging of (N,H,W,C)."""
    x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
    x = F.layer_norm(x, x.shape[-1:], state[f"{at}.norm.weight"], state[f"{at}.norm.bias"])
    return F.linear(x, state[f"{at}.reduction.weight"])


@pytest.mark.parametrize("kind", ["official", "timm", "mmsegmentation"])
def test_swin(tmp_path: Path, kind: str) -> None:
    state = swin_file("official" if kind == "mmsegmentation" else kind)
    source = state
    if kind == "mmsegmentation":  # as its script converts them
        names = {".attn.": ".attn.w_msa.", "layers.": "stages.", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1",
                 "patch_embed.proj": "patch_embed.projection"}  # fmt: skip
        state = {}
        for key, value in source.items():
            if "downsample" in key:  # channel by channel, and rows before columns
                value = torch.stack(value.chunk(4, -1), -1)[..., [0, 2, 1, 3]].flatten(-2)
            for theirs, new in names.items():
                key = key.replace(theirs, new)
            state |= {} if key.startswith("head") else {key: value}
    tensors, report, _ = converted(tmp_path, state, "upernet_swin_t")
    assert len(report.not_used) == {"official": 2 + 12 + 5 + 2, "timm": 4, "mmsegmentation": 2 + 12 + 5}[kind]
    assert report.fresh == [f"backbone.norm{k}.{leaf}" for k in range(4) for leaf in ("weight", "bias")]
    x = torch.rand(1, 4, 6, 192)
    at = f"layers.{1 + (kind == 'timm')}.downsample"
    torch.testing.assert_close(loaded(swin.Merge(192), tensors, "backbone.merges.1.")(x), merged(x, source, at))
    assert torch.equal(tensors["backbone.stages.2.5.expand.weight"], source["layers.2.blocks.5.mlp.fc1.weight"])


@pytest.mark.parametrize("channels", [4, 6])
def test_the_order_of_merged_positions_is_inverted_bit_for_bit(channels: int) -> None:
    value = torch.randn(3, 4 * channels)
    assert torch.equal(swin.to_positions(*swin.from_positions(value))[0], value)
    assert not torch.equal(swin.from_positions(value)[0], value)
    both = torch.randn(2, 5), torch.randn(4, 5)
    assert all(map(torch.equal, segformer.split(*segformer.fuse(*both)), both))


def mit_block(state: State, at: str, x: Tensor, size: tuple[int, int], heads: int, side: int) -> Tensor:
    """NVIDIA's block on (N,P,C): separate query, linear layers in the MLP."""

    def layer(key: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{at}.{key}.weight"], state[f"{at}.{key}.bias"])

    def normed(key: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{at}.{key}.weight"], state[f"{at}.{key}.bias"], 1e-6)

    count, places, width = x.shape
    y = normed("norm1", x)
    source = y.mT.reshape(count, width, *size)
    source = F.conv2d(source, state[f"{at}.attn.sr.weight"], state[f"{at}.attn.sr.bias"], stride=side).flatten(2).mT
    query = layer("attn.q", y).view(count, places, heads, -1).transpose(1, 2)
    key, value = (
        layer("attn.kv", normed("attn.norm", source)).view(count, -1, 2, heads, width // heads).permute(2, 0, 3, 1, 4)
    )
    shares = (query @ key.mT * (width // heads) ** -0.5).softmax(-1)
    x = x + layer("attn.proj", (shares @ value).transpose(1, 2).reshape(count, places, width))
    y = layer("mlp.fc1", normed("norm2", x)).mT.reshape(count, -1, *size)
    depthwise = (state[f"{at}.mlp.dwconv.dwconv.{leaf}"] for leaf in ("weight", "bias"))
    y = F.conv2d(y, *depthwise, padding=1, groups=y.shape[1]).flatten(2).mT
    return x + layer("mlp.fc2", F.gelu(y))


def test_nvidias_mit(tmp_path: Path) -> None:
    state = mit_file()
    tensors, report, _ = converted(tmp_path, state, "segformer_b0")
    assert (list(report.not_used), report.fresh) == (["head.weight", "head.bias"], [])
    x = torch.rand(1, 24, 64)
    block = loaded(segformer.Block(64, 2, 4, 0.0), tensors, "backbone.stages.1.blocks.1.")
    found = block(x, torch.Size((4, 6)))
    torch.testing.assert_close(found, mit_block(state, "block2.1", x, (4, 6), 2, 4), rtol=1e-4, atol=1e-4)
    model = build_model("segformer_b0", 3, "linear")
    for path in FILES:
        torch.nn.init.zeros_(model.backbone.stages[0].embed.weight)
        assert load_pretrained(model, tmp_path / path).complete
        assert torch.equal(model.backbone.stages[0].embed.weight, state["patch_embed1.proj.weight"])


@pytest.mark.parametrize(("positions", "distilled"), [(197, False), (577, False), (198, True)])
def test_plain_vit_for_the_adapter(tmp_path: Path, positions: int, distilled: bool) -> None:
    """AugReg and DeiT: position embeddings of another grid are resized; the convolutional branch is new."""
    state = vit_file(positions=positions, distilled=distilled)
    tensors, report, text = converted(tmp_path, state, "upernet_vit_adapter_t")
    side = 24 if positions == 577 else 14
    grid = state["pos_embed"][0, -(side**2) :].reshape(side, side, 192).permute(2, 0, 1)[None]
    expected = grid if side == 14 else F.interpolate(grid, (14, 14), mode="bicubic")
    torch.testing.assert_close(tensors["backbone.positions"][0, 1:], expected[0].flatten(1).T)
    note = f"  note         backbone.pos_embed resized from (1, {positions}, 192) to (1, 197, 192)"
    assert (note in text) == (positions != 197)
    assert "backbone.prior.* (38), backbone.interactions.* (172)" in text
    assert "backbone.blocks.11.attention_scale" not in tensors  # keeps its initial value, 1
    assert torch.equal(tensors["backbone.blocks.11.attention.qkv.weight"], state["blocks.11.attn.qkv.weight"])
    assert len(report.not_used) == (8 if distilled else 5)


def test_hrnets_classifier_is_left_out_and_named(tmp_path: Path) -> None:
    shapes = {key: tuple(value.shape) for key, value in outline("ocrnet_hr18").state_dict().items()}
    official = {
        key: shapes[ours] for ours, key in official_keys(outline("ocrnet_hr18")).items() if "batches" not in key
    }
    state = draws(
        {key.removeprefix("backbone."): each for key, each in official.items() if key.startswith("backbone.")}
    )
    parts = ["incre_modules.0.0.conv1", "incre_modules.3.0.bn1", "downsamp_modules.0.0", "downsamp_modules.2.1"]
    state |= {f"{part}.{leaf}": torch.rand(2) for part in [*parts, "final_layer.1", "classifier"]
              for leaf in ("weight", "bias")}  # fmt: skip
    tensors, report, text = converted(tmp_path, state, "ocrnet_hr18")
    used = "incre_modules.* (4), backbone.downsamp_modules.* (4), backbone.final_layer.* (2), backbone.classifier.* (2)"
    assert f"not used     12: backbone.{used}" in text
    assert not report.fresh
    assert torch.equal(
        tensors["backbone.stages.1.3.fuse.2.0.1.conv.weight"], state["stage3.3.fuse_layers.2.0.1.0.weight"]
    )


# ---- files that do not fit -------------------------------------------------------------------------------------------


def refused(path: Path, name: str) -> tuple[str, str]:
    """The errors of `convert` with the name of a network, and of `model.pretrained`."""
    done = convert(path, path.parent / "ours.safetensors", "--model", name)
    assert done.exit_code == 2, done.output
    assert not (path.parent / "ours.safetensors").exists()
    with pytest.raises(CommandError) as caught:
        load_pretrained(outline(name), path)
    first, second = done.output.partition(f"error: {path}")[2], str(caught.value)
    assert second.startswith(f"model.pretrained={path}")
    assert len(first.strip().splitlines()) == len(second.splitlines()) == 3, (first, second)
    return first, second


@pytest.mark.parametrize(
    ("kind", "name", "looks"),
    [("swin", "upernet_swin_t", "upernet_swin_s"), ("mit", "segformer_b0", ""), ("resnet", "fcn_r50", "fcn_r101"),
     ("vit", "upernet_vit_adapter_t", "upernet_vit_adapter_s")],
)  # fmt: skip
def test_another_depth_or_width(tmp_path: Path, kind: str, name: str, looks: str) -> None:
    state = {
        "swin": lambda: swin_file("official", (2, 2, 18, 2)),
        "mit": lambda: mit_file((2, 2, 4, 2)),  # no variant
        "resnet": lambda: resnet(TORCHVISION, (3, 4, 23, 3)),
        "vit": lambda: vit_file(384),
    }[kind]()
    torch.save(state, tmp_path / "file.pth")
    for text in refused(tmp_path / "file.pth", name):
        assert (
            f"look like {looks} (100 %" if looks else "40 unexpected" in text or "look like segformer_b0 (81 %" in text
        )


@pytest.mark.parametrize("kind", ["official", "timm"])
def test_another_window(tmp_path: Path, kind: str) -> None:
    torch.save(swin_file(kind, window=12), tmp_path / "file.pth")
    for text in refused(tmp_path / "file.pth", "upernet_swin_t"):
        assert "Swin with windows of 12×12 positions (relative_position_bias_table has 529 rows)\nexpected 7×7" in text


@pytest.mark.parametrize("name", ["fcn_r50", "segformer_b0", "upernet_swin_t", "ocrnet_hr18", "upernet_vit_adapter_t"])
def test_another_family(tmp_path: Path, name: str) -> None:
    other, looks = (mit_file(), "segformer_b0") if name != "segformer_b0" else (vit_file(), "upernet_vit_adapter_t")
    torch.save(other, tmp_path / "file.pth")
    for text in refused(tmp_path / "file.pth", name):
        assert f"look like {looks} (100 %" in text
