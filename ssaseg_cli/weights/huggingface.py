"""Folders of Hugging Face `transformers`: reads what their configuration says, and writes such folders.

A folder holds the weights (model.safetensors or pytorch_model.bin), `config.json` (network and class names) and
`preprocessor_config.json` (size, mean and std of images, meaning of label 0). The names of the tensors are those of the
layouts in `models.networks`. Source: transformers 5.24, `SegformerConfig`, `UperNetConfig`, `SwinConfig`,
`SegformerImageProcessor`. Values that are missing there have these classes' defaults.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save

from ssaseg.cli.errors import CommandError
from ssaseg.files.structured import read_json
from ssaseg.files.text import cut, describe, printable
from ssaseg.files.writing import write_atomic
from ssaseg.models import Segmenter
from ssaseg.models.build import family_of
from ssaseg.models.checkpoint import numbered
from ssaseg.models.header import MOST_CLASSES, SCHEMA
from ssaseg.models.networks import segformer, segformer_nvidia, swin, upernet
from ssaseg.models.official import official_entries
from ssaseg.recipes import RecipeError, parse_protocol
from ssaseg.recipes.fields import LARGEST_SIDE

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
FILES = ("model.safetensors", "pytorch_model.bin")  # the first that is there is read

# What the networks of ssaseg have; a configuration without a key has the same value.
SEGFORMER: Mapping[str, Any] = {
    "num_channels": 3,
    "num_encoder_blocks": 4,
    "num_attention_heads": list(segformer.HEADS),
    "sr_ratios": list(segformer.REDUCTIONS),
    "patch_sizes": [7, 3, 3, 3],
    "strides": [4, 2, 2, 2],
    "mlp_ratios": [segformer.MLP_RATIO] * 4,
    "hidden_act": "gelu",
    "reshape_last_stage": True,
}
SWIN: Mapping[str, Any] = {
    "num_channels": 3,
    "patch_size": 4,
    "window_size": swin.WINDOW,
    "mlp_ratio": swin.MLP_RATIO,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "use_absolute_embeddings": False,
    "layer_norm_eps": 1e-5,
}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
UPERNET: dict[str, Any] = {
    "hidden_size": 512,
    "pool_scales": list(upernet.POOLS),
    "auxiliary_channels": 256,
    "auxiliary_num_convs": 1,
    "auxiliary_concat_input": False,
}
# What a folder may hold → the kind of its configuration, and whether it is a whole network.
ARCHITECTURES = {
    "SegformerForSemanticSegmentation": ("segformer", True),
    "UperNetForSemanticSegmentation": ("upernet", True),
    "SegformerForImageClassification": ("segformer", False),
    "SegformerModel": ("segformer", False),
    "SwinForImageClassification": ("swin", False),
    "SwinModel": ("swin", False),
}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


class Stated(NamedTuple):
    """What a folder says about its weights."""

    architecture: str  # by the name in transformers
    whole: bool  # a segmentation network, not only a backbone
    model: str  # a network of ssaseg; of a backbone, one with it
    classes: list[str] | None  # None: there are no names
    metadata: dict[str, Any]  # for our header: mean, std, protocol, reduce_zero_label
    lines: tuple[str, ...]  # for the user
    auxiliary: bool = True  # whether the weights hold the auxiliary heads of the network


# ---- reading -------------------------------------------------------------------------------------------------------


def weights_file(folder: Path) -> Path:
    """The weights of a folder. Raises CommandError if it has none, or no configuration."""
    if not (folder / CONFIG).is_file():
        raise CommandError(
            f"{folder}: a folder without {CONFIG}\nexpected a folder of transformers: {CONFIG} and {FILES[0]}\n"
            "download the whole folder, or give one file of weights"
        )
    found = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if found is not None:
        return found
    parts = next((folder / f"{name}.index.json" for name in FILES if (folder / f"{name}.index.json").exists()), None)
    if parts is not None:
        raise CommandError(
            f"{parts}: the weights are in several files\nexpected one, {FILES[0]}\n"
            "save it again: model.save_pretrained(FOLDER, max_shard_size='10GB')"
        )
    raise CommandError(f"{folder}: no weights in it\nexpected {' or '.join(FILES)} beside {CONFIG}")


def read_stated(file: Path) -> Stated | None:
    """What the folder of a file of weights says; None if `file` is not the weights of such a folder.

    Raises CommandError for a configuration that cannot be read, is of another task or of a network that ssaseg does not
    have, or has a value of another type or out of its range. The message names the key.
    """
    path = file.parent / CONFIG
    if file.name not in FILES or not path.is_file():
        return None
    config = _read(path)
    if "architectures" not in config and "model_type" not in config:  # of another program, such as timm
        return None
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else named
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise _wrong(path, "architectures", architecture, f"one of: {', '.join(ARCHITECTURES)}")
    kind, whole = ARCHITECTURES[architecture]
    if kind == "segformer":
        model = _segformer(path, config, whole)
    else:
        model = _upernet(path, config) if whole else f"upernet_swin_{_swin(path, config)}"
    if not whole:
        return Stated(architecture, whole, model, None, {}, ())
    metadata, lines = _preprocessing(file.parent / PREPROCESSOR)
    auxiliary = config.get("use_auxiliary_head", True) is not False
    if not auxiliary:
        lines = (*lines, "  no auxiliary head in the folder: this network's gets new weights; only training uses it")
    return Stated(architecture, whole, model, _classes(path, config), metadata, lines, auxiliary)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: cannot be read ({printable(cut(describe(error), 100))})\nexpected JSON") from None
    if not isinstance(content, dict):
        raise CommandError(f"{path}: is not a JSON object\nexpected a configuration of transformers")
    return content


def _wrong(path: Path, key: str, got: Any, expected: str, fix: str = "") -> CommandError:
    shown = printable(cut(json.dumps(got), 80))
    fix = fix or "ssaseg has no network of another configuration"
    return CommandError(f"{path}: {key}: got {shown}\nexpected {expected}\n{fix}")


def _require(path: Path, config: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> None:
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise _wrong(path, f"{prefix}{key}", config[key], json.dumps(value))


def _segformer(path: Path, config: Mapping[str, Any], whole: bool) -> str:
    _require(path, config, SEGFORMER)
    sizes = {name: [list(v.depths), list(v.widths)] for name, v in segformer.VARIANTS.items()}
    given = [config.get("depths", [2, 2, 2, 2]), config.get("hidden_sizes", [32, 64, 160, 256])]
    name = next((name for name, size in sizes.items() if size == given), None)
    if name is None:
        known = "; ".join(f"{size}".replace(" ", "") for size in sizes.values())
        raise _wrong(path, "depths, hidden_sizes", given, f"those of B0 to B5: {known}")
    if not whole:
        return name
    name = name.replace("_", "_nvidia_")
    channels = segformer_nvidia.VARIANTS[name].channels
    _require(path, {"decoder_hidden_size": config.get("decoder_hidden_size", 256)}, {"decoder_hidden_size": channels})
    return name


def _swin(path: Path, config: Mapping[str, Any], prefix: str = "") -> str:
    _require(path, config, SWIN, prefix)
    sizes = {name: [v.width, list(v.depths), list(v.heads)] for name, v in swin.VARIANTS.items()}
    given = [
        config.get("embed_dim", 96),
        config.get("depths", [2, 2, 6, 2]),
        config.get("num_heads", [3, 6, 12, 24]),
    ]
    name = next((name for name, size in sizes.items() if size == given), None)
    if name is None:
        known = "; ".join(f"{size}".replace(" ", "") for size in sizes.values())
        raise _wrong(path, f"{prefix}embed_dim, depths, num_heads", given, f"those of Swin-T, S, B or L: {known}")
    return name


def _upernet(path: Path, config: Mapping[str, Any]) -> str:
    backbone = config.get("backbone_config")
    if not isinstance(backbone, dict) or backbone.get("model_type") != "swin":
        got = backbone.get("model_type") if isinstance(backbone, dict) else backbone
        raise _wrong(path, "backbone_config.model_type", got, '"swin"')
    _require(path, config, UPERNET)
    size = _swin(path, backbone, "backbone_config.")
    if backbone.get("out_indices") != [1, 2, 3, 4]:  # the same in numbers
        _require(path, {"out_features": backbone.get("out_features")}, {"out_features": STAGES}, "backbone_config.")
    width = 4 * swin.VARIANTS[size].width
    if config.get("auxiliary_in_channels") not in (None, width):
        raise _wrong(path, "auxiliary_in_channels", config["auxiliary_in_channels"], f"{width} or null")
    return f"upernet_swin_{size}"


def _classes(path: Path, config: Mapping[str, Any]) -> list[str] | None:
    """The names of `id2label` in the order of their numbers; None without it, and for names that say nothing."""
    named = config.get("id2label")
    if named is None:
        return None
    if not isinstance(named, dict) or set(named) != {str(k) for k in range(len(named))}:
        keys = list(named)[:8] if isinstance(named, dict) else named
        raise _wrong(path, "id2label", keys, "the numbers from 0 without gaps, each with a name", "add what is missing")
    names = [named[str(k)] for k in range(len(named))]
    fits, expected = SCHEMA["classes"]
    if not fits(names):
        got = names if len(names) <= MOST_CLASSES else f"{len(names)} names"
        raise _wrong(path, "id2label", got, expected, "correct the names")
    return None if names in (unnamed(len(names)), numbered(len(names))) else names


def unnamed(classes: int) -> list[str]:
    """The names that transformers gives to classes without names."""
    return [f"LABEL_{k}" for k in range(classes)]


def _preprocessing(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Metadata from the configuration of the image processor, and lines for the user."""
    if not path.is_file():
        return {}, (f"  images       no {PREPROCESSOR}: not resized, mean and std of ImageNet",)
    config = _read(path)

    def flag(key: str, default: bool) -> bool:
        value = config.get(key, default)
        if value is not None and not isinstance(value, bool):
            raise _wrong(path, key, value, "true or false", "correct it")
        return bool(value)

    if flag("do_center_crop", False):
        raise _wrong(path, "do_center_crop", True, "false: ssaseg labels whole images", "set it to false")
    factor = config.get("rescale_factor", 1 / 255) if flag("do_rescale", True) else 1.0
    if not _is_number(factor) or not 1e-6 <= factor <= 1e3:
        raise _wrong(path, "rescale_factor", factor, "a number from 1e-6 to 1000", "correct it")
    metadata: dict[str, Any] = {}
    normalised = flag("do_normalize", True)
    for key, ours, none in (("image_mean", "mean", 0.0), ("image_std", "std", 1.0)):
        value = config.get(key, IMAGENET[key]) if normalised else [none] * 3
        fits, expected = SCHEMA[ours]
        scaled = [round(each / factor, 6) for each in value] if _are_numbers(value) else value
        if not fits(scaled):
            raise _wrong(path, key, value, f"{expected}, divided by 255", "correct it")
        metadata[ours] = scaled
    scale, line = (
        _scale(path, 512 if config.get("size") is None else config["size"])
        if flag("do_resize", True)
        else (None, "not resized")
    )
    metadata["protocol"] = {"scale": scale, "multiple": None}
    try:
        parse_protocol(metadata["protocol"], str(path))
    except RecipeError as error:
        raise CommandError(str(error)) from None
    reduced = flag("do_reduce_labels" if "do_reduce_labels" in config else "reduce_labels", False)
    metadata["reduce_zero_label"] = reduced
    meaning = "label 1 is class 0, and 0 is ignored" if reduced else "label 0 is class 0"
    lines = (
        f"  images       {line}",
        f"  labels       {meaning}: a recipe for such labels has data.reduce_zero_label: {str(reduced).lower()}",
    )
    return metadata, lines


def _scale(path: Path, size: Any) -> tuple[list[int], str]:
    """`test.scale` for an image processor's `size`, and a phrase."""
    forms = (("width", "height"), ("longest_edge", "shortest_edge"))
    given = {"width": size, "height": size} if _is_number(size) else size
    if isinstance(given, dict) and set(given) == {"shortest_edge"}:
        given = given | {"longest_edge": LARGEST_SIDE}  # in effect no limit
    form = next((form for form in forms if isinstance(given, dict) and all(given.get(key) for key in form)), None)
    sides = [] if form is None else [given[key] for key in form]
    if form is None or any(not isinstance(side, int) or isinstance(side, bool) for side in sides):
        expected = "height and width, or shortest_edge and longest_edge [pixels]"
        raise _wrong(path, "size", size, expected, "add what is missing; a large longest_edge sets no limit")
    stretched = ", aspect kept; transformers stretches them to this size" if form == forms[0] else ""
    return sides, f"fitted into {sides[0]}x{sides[1]}{stretched}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


# ---- writing -------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, network: Segmenter, metadata: Mapping[str, Any], reduced: bool) -> list[str]:
    """Writes a network as a folder that `transformers` loads, and returns lines that say what it cannot hold.

    reduced: whether label 0 is ignored, and label 1 is class 0. Raises CommandError for a network that `transformers`
    does not have, and OSError if a file cannot be written.
    """
    layout = next((each for each in family_of(network.name).layouts if each.name in LAYOUTS and each.heads), None)
    if layout is None or network.classifier_name != "linear":
        raise CommandError(
            f"{folder}: transformers has no {network.name} with {network.classifier_name}\n"
            "expected segformer_nvidia_* or upernet_swin_*, with linear\n"
            "give the name of a file: .safetensors (ssaseg's format), .pth (official names), .onnx or .pt2"
        )
    if network.channels != 3:
        raise CommandError(
            f"{folder}: the network is for images of {network.channels} channels\n"
            "expected 3, as the image processors of transformers read them\ngive the name of a file instead"
        )
    state, prefix = network.state_dict(), LAYOUTS[layout.name]
    given = {
        f"{prefix}{name.removeprefix('backbone.')}" if name.startswith("backbone.") else name: value.contiguous()
        for entry in official_entries(network, layout=layout.name)
        for name, value in entry.give(state).items()
    }
    classes = metadata["classes"]
    classes = unnamed(len(classes)) if classes == numbered(len(classes)) else classes
    config = _config(network) | {
        "id2label": {str(k): name for k, name in enumerate(classes)},
        "label2id": {name: k for k, name in enumerate(classes)},
    }
    protocol = parse_protocol(metadata["protocol"], "protocol of the checkpoint").model_dump(mode="json")
    scale = protocol.pop("scale")
    processor = {
        "image_processor_type": "SegformerImageProcessor",
        "do_resize": scale is not None,
        **({} if scale is None else {"size": {"shortest_edge": min(scale), "longest_edge": max(scale)}}),
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [round(value / 255, 9) for value in metadata["mean"]],
        "image_std": [round(value / 255, 9) for value in metadata["std"]],
        "do_reduce_labels": reduced,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FILES[0], save(given, {"format": "pt"}))
    for name, content in ((PREPROCESSOR, processor), (CONFIG, config)):
        write_atomic(folder / name, (json.dumps(content, indent=2) + "\n").encode())
    usual = parse_protocol({}, "").model_dump(mode="json")
    lost = [f"{key}: {json.dumps(value)}" for key, value in protocol.items() if value != usual[key]]
    lines = [f"left out, what transformers cannot hold: test.{', test.'.join(lost)}"] if lost else []
    if scale is not None:
        lines.append(f"{PREPROCESSOR} is for transformers 5: version 4 can only stretch images to one size")
    return lines


# Our layouts of whole networks → what stands in files where they have `backbone.`.
LAYOUTS = {segformer.TRANSFORMERS.name: "segformer.", upernet.TRANSFORMERS.name: "backbone."}


def _config(network: Segmenter) -> dict[str, Any]:
    if network.name in segformer_nvidia.VARIANTS:
        variant = segformer_nvidia.VARIANTS[network.name]
        return {
            "architectures": ["SegformerForSemanticSegmentation"],
            "model_type": "segformer",
            **SEGFORMER,
            "depths": list(variant.depths),
            "hidden_sizes": list(variant.widths),
            "decoder_hidden_size": variant.channels,
        }
    size = upernet.VARIANTS[network.name]
    backbone = {
        "model_type": "swin",
        **SWIN,
        "embed_dim": size.width,
        "depths": list(size.depths),
        "num_heads": list(size.heads),
        "out_features": STAGES,
    }
    return {
        "architectures": ["UperNetForSemanticSegmentation"],
        "model_type": "upernet",
        **UPERNET,
        "auxiliary_in_channels": 4 * size.width,
        "backbone_config": backbone,
    }
