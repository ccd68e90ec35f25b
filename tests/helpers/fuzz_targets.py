"""What `fuzzing` tries: how to make an input of each kind, and what reads it."""

import argparse
import base64
import contextlib
import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mutation import (
    DEEP,
    ODD,
    WORDS,
    change_bytes,
    change_json,
    change_near_start,
    change_png,
    change_text,
    change_tree,
)
from PIL import Image
from states import save
from tiffs import tiff

from ssaseg.cli.main import cli
from ssaseg.cli.training.state import load_state
from ssaseg.cli.weights.foreign import read_weights
from ssaseg.datasets import build_dataset
from ssaseg.datasets.bands.reading import count_bands, read_bands
from ssaseg.datasets.conventions import recognise
from ssaseg.datasets.conventions.base import Options, Tree
from ssaseg.datasets.decoding import header_size, read_image, read_mask
from ssaseg.models import build_model, load_model, save_model
from ssaseg.recipes import load_recipe, parse_recipe, recipe_file


@dataclass(frozen=True)
class Target:
    """A kind of input. `marker`: a file that exists if an input has run code."""

    whole: bytes  # an input that is in order
    make: Callable[[random.Random], bytes]
    read: Callable[[bytes], object]
    marker: Path


def _by_file(file: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Reads content by way of a file."""

    def from_content(content: bytes) -> object:
        file.write_bytes(content)
        return read(file)

    return from_content


# ---- images and masks --------------------------------------------------------------------------------------------
def pictures(mode: str) -> list[bytes]:
    """Small whole files of all formats that can be written in this mode."""
    rng, found = np.random.default_rng(0), []
    values = rng.integers(0, 9, (23, 31, 3) if mode == "RGB" else (23, 31), dtype=np.uint8)
    for suffix in ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF"):
        buffer = io.BytesIO()
        picture = Image.fromarray(values)
        if mode == "P":
            picture = picture.convert("P")
        with contextlib.suppress(OSError, KeyError):  # some formats have no such mode
            picture.save(buffer, suffix)
            found.append(buffer.getvalue())
    for compression in ("tiff_lzw", "packbits", "tiff_deflate"):
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "TIFF", compression=compression)
        found.append(buffer.getvalue())
    return found


def images(folder: Path) -> Target:
    """Files of nine formats as images."""
    return _pictures(folder, pictures("RGB") + pictures("L"), read_image)


def masks(folder: Path) -> Target:
    """Files of nine formats as masks."""
    return _pictures(folder, pictures("L") + pictures("P"), read_mask)


def bands(folder: Path) -> Target:
    """TIFF files of four bands, stored in several ways."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (23, 31, 4), np.uint8)
    deep = rng.integers(0, 2**16, (9, 11, 4), np.uint16)
    whole = [tiff(values, t262=2, t338=[2]), tiff(values, planar=True), tiff(values, deflate=True), tiff(deep)]
    whole.append(tiff(*np.moveaxis(deep, 2, 0)))

    def read(file: Path) -> None:
        count_bands(file)
        read_bands(file, 4)

    return _pictures(folder, whole, read)


def _pictures(folder: Path, whole: list[bytes], read: Callable[[Path], object]) -> Target:
    def make(rng: random.Random) -> bytes:
        data = rng.choice(whole)
        if data[:4] == b"\x89PNG" and rng.random() < 0.7:
            return change_png(data, rng)
        return rng.choice((change_bytes, change_near_start))(data, rng)

    def both(file: Path) -> None:
        header_size(file)
        read(file)

    return Target(whole[0], make, _by_file(folder / "x.png", both), folder / "marker")


# ---- recipes, annotations, command lines ---------------------------------------------------------------------------
def recipes(folder: Path) -> Target:
    """YAML files of recipes."""
    whole = [
        recipe_file(name).read_bytes() for name in ("demo", "ade20k-segnext_t-ssa", "coco_stuff10k-seaformer_b-ssa")
    ]

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            tree = change_tree(load_recipe("demo").model_dump(mode="json"), rng)
            return json.dumps(tree).replace(f'"{DEEP}"', "[" * 900 + "]" * 900).encode(errors="surrogatepass")
        return change_text(rng.choice(whole), rng)

    return Target(whole[0], make, _by_file(folder / "r.yaml", lambda file: load_recipe(str(file))), folder / "marker")


def annotations(folder: Path) -> Target:
    """COCO-format files, with polygons and run lengths; all masks are painted."""
    (folder / "images").mkdir(exist_ok=True)
    for name in ("a", "b"):
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(folder / f"images/{name}.png")
    square = [1, 1, 12, 1, 12, 9, 1, 9]
    common = {"iscrowd": 0, "area": 88, "bbox": [1, 1, 11, 8]}
    runs: list[Any] = [{"size": [20, 30], "counts": [100, 50, 450]}, {"size": [20, 30], "counts": "T3b1R>"}, [square]]
    whole = {
        "images": [{"id": k, "file_name": f"{name}.png", "height": 20, "width": 30} for k, name in enumerate("ab")],
        "categories": [{"id": k, "name": f"c{k}"} for k in range(3)],
        "annotations": [
            {"id": k, "image_id": k % 2, "category_id": k % 3, "segmentation": runs[k % 3], **common} for k in range(4)
        ],
    }
    data = json.dumps(whole).encode()

    def read(file: Path) -> None:
        split = {"images": "images", "annotations": file.name}
        settings = {"dataset": "coco_json", "root": str(folder), "train": split, "val": split}
        recipe = parse_recipe(load_recipe("demo").model_dump(mode="json") | {"data": settings}, "x")
        dataset = build_dataset("coco_json", "train", root=folder, options=recipe.data.model_dump())
        for index in range(len(dataset)):
            dataset.load(index)

    return Target(data, lambda rng: change_json(data, rng), _by_file(folder / "x.json", read), folder / "marker")


def outlines(folder: Path) -> Target:
    """Files of annotation tools. The first byte of an input says which: each has a folder, with an image."""
    outline = [[1, 1], [12, 1], [12, 9]]
    png = base64.b64encode(pictures("L")[0]).decode()
    size, classes = {"height": 40, "width": 40}, [{"title": name, "shape": "any"} for name in ("a", "b")]
    labelme: list[Any] = [
        {"label": "a", "points": outline},
        {"label": "b", "points": outline[:2], "shape_type": "circle"},
    ]
    labelme += [{"label": "b", "points": [[0, 0], [30, 22]], "shape_type": "mask", "mask": png}]
    objects: list[Any] = [
        {"classTitle": "a", "geometryType": "polygon", "points": {"exterior": outline, "interior": [outline]}}
    ]
    objects += [{"classTitle": "b", "geometryType": "bitmap", "bitmap": {"data": png, "origin": [1, 2]}}]
    shapes = [{"name": "polygon", "all_points_x": [1, 9, 9], "all_points_y": [1, 1, 9]}]
    shapes += [{"name": "ellipse", "cx": 9, "cy": 9, "rx": 5, "ry": 3, "theta": 0.5}]
    regions = [{"shape_attributes": each, "region_attributes": {"kind": "a"}} for each in shapes]
    segments = [{"id": 0x636363, "category_id": 1, "iscrowd": 0}]
    files = {
        "labelme/a.json": {"shapes": labelme, "imagePath": "a.png", "imageHeight": 40, "imageWidth": 40},
        "supervisely/x/ann/a.png.json": {"size": size, "objects": objects},
        "supervisely/meta.json": {"classes": classes},
        "via/v.json": {"_via_img_metadata": {"a.png1": {"filename": "a.png", "regions": regions}}},
        "panoptic/s.json": {
            "images": [{"id": 1, "file_name": "a.png"}],
            "annotations": [{"image_id": 1, "file_name": "s.png", "segments_info": segments}],
            "categories": [{"id": 1, "name": "a"}],
        },
    }
    whole = [json.dumps(content).encode() for content in files.values()]
    for name, content in zip(files, whole, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name in ("labelme/a.png", "supervisely/x/img/a.png", "via/a.png", "panoptic/a.png", "panoptic/s.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (0x63, 0x63, 0x63)).save(folder / name)

    def make(rng: random.Random) -> bytes:
        number = rng.randrange(len(files))
        return bytes([number]) + change_json(whole[number], rng)

    def read(content: bytes) -> None:
        file = folder / list(files)[content[0]]
        file.write_bytes(content[1:])
        try:
            tree = Tree(folder / list(files)[content[0]].partition("/")[0])
            if found := recognise(tree):
                source = found[0].open_source(tree, Options())
                for item in source.items:
                    source.read(item)
        finally:
            file.write_bytes(whole[content[0]])

    return Target(bytes(1) + whole[0], make, read, folder / "marker")


def commands(folder: Path) -> Target:
    """Command lines that compute nothing: wrong options, values, names of files, and recipe keys."""
    starts = (
        ["train", "demo", *["--print-config"] * 4], ["eval", "x.safetensors"], ["predict", "x", "in", "--out", "out"],
        ["recipes", "show", "demo"], ["recipes", "keys"], ["data", "init", "nothing"], ["convert", "x.pth", "y"],
        ["profile", "nothing"], ["explain", "x", "in", "--out", "out"], ["compare", "x", "y", "--out", "z.png"],
        ["data", "prepare", "ade20k"], ["--help"],
    )  # fmt: skip
    keys = [f"{section}.{key}" for section, values in load_recipe("demo").model_dump().items()
            if isinstance(values, dict) for key in values]  # fmt: skip
    options = ["--gpus", "--device", "--json", "--out", "--size", "--split", "--save", "--resume", "--check", "--data"]
    odd = [str(value)[:6000] for value in ODD if value != "\ud800"]  # which no argument can hold
    values = [*WORDS, *odd, "0", "-1", "1e400", "\udcff", "a" * 300, "/", "."]

    def make(rng: random.Random) -> bytes:
        given = list(rng.choice(starts))
        for _ in range(rng.randrange(1, 4)):
            word = rng.choice((rng.choice(options), f"{rng.choice(keys)}={rng.choice(values)}", rng.choice(values)))
            given.insert(rng.randrange(1, len(given) + 1), word)
        return json.dumps(given).encode()

    def read(content: bytes) -> None:
        given = [word.replace("\0", "") for word in json.loads(content)]
        before, nowhere = os.getcwd(), io.StringIO()
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                os.environ["SSASEG_DEBUG"] = "1"  # errors are raised here, and printed by `attempt`
                cli.main(given)
        except SystemExit:
            pass
        finally:
            os.chdir(before)

    return Target(json.dumps(["recipes", "list"]).encode(), make, read, folder / "marker")


# ---- checkpoints and states ----------------------------------------------------------------------------------------
def checkpoints(folder: Path) -> Target:
    """Our safetensors files: headers with changed values, and changed bytes."""
    file = folder / "whole.safetensors"
    save_model(file, build_model("seaformer_t", 3), {"recipe": load_recipe("demo").model_dump(mode="json")})
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    head, tensors = json.loads(content[8 : 8 + size]), content[8 + size :]

    def make(rng: random.Random) -> bytes:
        kind = rng.random()
        if kind < 0.2:
            return change_near_start(content, rng)
        changed = json.loads(json.dumps(head))
        if kind < 0.4:  # names, types, shapes and places of tensors
            names = rng.sample([name for name in changed if name != "__metadata__"], 3)
            part = change_tree({name: changed[name] for name in names}, rng)
            changed |= part if isinstance(part, dict) else {}
        else:
            meta = {key: json.loads(value) for key, value in changed["__metadata__"].items()}
            meta = change_tree(meta, rng)
            deep = "[" * 9000 + "]" * 9000
            changed["__metadata__"] = {
                str(key): json.dumps(value).replace(f'"{DEEP}"', deep) for key, value in dict(meta or {}).items()
            }
        text = json.dumps(changed).replace(f'"{DEEP}"', "[" * 900 + "]" * 900).encode(errors="surrogatepass")
        return struct.pack("<Q", len(text)) + text + tensors

    return Target(content, make, _by_file(folder / "x.safetensors", load_model), folder / "marker")


class Canary:
    """Makes a pickle that creates a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


# Names in a pickle in the place of others.
NAMES = (
    b"posix\nsystem", b"builtins\neval", b"builtins\ngetattr", b"numpy\nndarray", b"numpy\ndtype", b"torch\nload",
    b"numpy.core.multiarray\n_reconstruct", b"numpy._core.multiarray\nscalar", b"torch._utils\n_rebuild_tensor",
    b"torch._utils\n_rebuild_device_tensor_from_numpy", b"torch._utils\n_rebuild_sparse_tensor", b"torch\nFloatStorage",
    b"torch._utils\n_rebuild_qtensor", b"torch._utils\n_rebuild_meta_tensor_no_storage", b"torch\nDoubleStorage",
    b"torch._utils\n_rebuild_nested_tensor", b"torch._utils\n_rebuild_parameter", b"collections\nOrderedDict",
    b"torch._tensor\n_rebuild_from_type_v2", b"torch\nSize", b"torch\nfloat8_e4m3fn", b"argparse\nNamespace",
)  # fmt: skip


def change_archive(data: bytes, rng: random.Random, marker: Path) -> bytes:
    """A file of torch.save with changed records, whose checksums are right; sometimes compressed or doubled."""
    if rng.random() < 0.15:
        return change_bytes(data, rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        changed = rng.choice(old.namelist()) if rng.random() < 0.3 else next(n for n in old.namelist() if "pkl" in n)
        for name in old.namelist():
            content = old.read(name)
            if name == changed:
                content = change_pickle(content, rng, marker) if "pkl" in name else change_bytes(content, rng)
            method = zipfile.ZIP_DEFLATED if rng.random() < 0.01 else zipfile.ZIP_STORED
            new.writestr(zipfile.ZipInfo(name), content, compress_type=method)
    return buffer.getvalue()


def change_pickle(content: bytes, rng: random.Random, marker: Path) -> bytes:
    """A pickle with changed names, numbers or bytes, or with code in front."""
    kind = rng.randrange(5)
    if kind == 0:
        return change_bytes(content, rng)
    if kind == 1:
        evil = pickle.dumps(Canary(marker), protocol=2)[2:-1]  # without its start and its end
        at = content.find(b"}") if rng.random() < 0.5 else 2
        return content[:at] + evil + b"0" + content[at:]
    pieces = content.split(b"c")
    spots = [
        k for k, piece in enumerate(pieces) if piece.count(b"\n") >= 2 and piece[:5] in (b"torch", b"colle", b"numpy")
    ]
    if kind in (2, 3) and spots:
        k = rng.choice(spots)
        rest = pieces[k].split(b"\n", 2)[2]
        pieces[k] = rng.choice(NAMES) + b"\n" + rest
        return b"c".join(pieces)
    at = [k for k in range(len(content) - 5) if content[k : k + 1] in (b"K", b"M", b"J")]
    changed = bytearray(content)
    for k in rng.sample(at, min(3, len(at))):
        width = {b"K": 1, b"M": 2, b"J": 4}[content[k : k + 1]]
        changed[k + 1 : k + 1 + width] = rng.choice((0, 1, 255, 2**16 - 1, 2**31 - 1)).to_bytes(4, "little")[:width]
    return bytes(changed)


def pickles(folder: Path) -> Target:
    """`.pth` files of both formats, with tensors, arrays and other things as training scripts save them."""
    weights = {f"layer{k}.weight": torch.arange(12.0).reshape(3, 4) + k for k in range(4)}
    whole: list[bytes] = []
    for content in (
        weights,
        {"state_dict": weights, "epoch": 3, "args": argparse.Namespace(lr=0.1, name="x"), "best": np.float64(1.5)},
        {
            "model": {key: value.numpy() for key, value in weights.items()},
            "ema": weights,
            "half": torch.zeros(2).half(),
        },
    ):
        for new in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=new)
            whole.append(buffer.getvalue())

    def make(rng: random.Random) -> bytes:
        data = rng.choice(whole)
        if data[:2] == b"PK":
            return change_archive(data, rng, folder / "marker")
        return change_pickle(data, rng, folder / "marker")

    def read(file: Path) -> None:
        for tensor in read_weights(file).tensors.values():
            tensor.double().sum().item()  # every element is looked at

    return Target(whole[0], make, _by_file(folder / "x.pth", read), folder / "marker")


def states(folder: Path) -> Target:
    """Training states."""
    (folder / "run").mkdir(exist_ok=True)
    save(folder / "run", 3)
    file = folder / "run/state-3.pt"
    whole = file.read_bytes()
    content = torch.load(file, weights_only=True)

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return change_archive(whole, rng, folder / "marker")
        buffer = io.BytesIO()
        odd = (*ODD, torch.zeros(3), torch.zeros(1).expand(10**6), torch.zeros(2, dtype=torch.int64))
        torch.save(change_tree(torch.load(io.BytesIO(whole), weights_only=True), rng, odd), buffer)
        return buffer.getvalue()

    assert content["progress"]["step"] == 3
    return Target(whole, make, _by_file(file, lambda each: load_state(each.parent)), folder / "marker")


TARGETS: dict[str, Callable[[Path], Target]] = {
    each.__name__: each
    for each in (images, masks, bands, recipes, annotations, outlines, commands, checkpoints, pickles, states)
}
