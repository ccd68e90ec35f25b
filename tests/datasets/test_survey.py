"""Which folders and files are chosen, by their names alone: layouts of public data sets, and what could be mistaken."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssaseg.datasets import DataError
from ssaseg.datasets.pairs import IMAGE_SUFFIXES
from ssaseg.datasets.survey import Found, find_folders, several_error


def look(root: Path, files: str, **options: object) -> Found:
    """What is found among empty files; `name=text` has a content, in which ~ stands for a space and ; for a new line,
    as ? stands for a space in names.
    """
    for file in files.split():
        name, _, text = file.partition("=")
        path = root / name.replace("?", " ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(";", "\n").replace("~", " "))
    return find_folders(root, **options)  # type: ignore[arg-type]


# Files; the folders of each split, or "all"; what ends the masks' names.
FOLDERS = {
    "a scene without labels": (
        "scene_a/images/0.png scene_a/images/1.png scene_b/images/0.png scene_b/images/1.png scene_b/labels/0.png "
        "scene_b/labels/1.png",
        {"all": ("scene_b/images", "scene_b/labels")},
        ".png",
    ),
    "scenes below the kinds": (
        "images/scene_a/0.png images/scene_b/0.png labels/scene_b/0.png",
        {"all": ("images", "labels")},
        ".png",
    ),
    "masks of one modality": (
        "rgb/images/0.png thermal/images/0.png thermal/labels/0.png",
        {"all": ("thermal/images", "thermal/labels")},
        ".png",
    ),
    "PST900": (
        "train/rgb/0.png train/depth/0.png train/thermal/0.png train/labels/0.png "
        "test/rgb/1.png test/depth/1.png test/thermal/1.png test/labels/1.png",
        {"train": ("train/rgb", "train/labels"), "val": ("test/rgb", "test/labels")},
        ".png",
    ),
    "modalities below images": (
        "images/thermal/0.png images/rgb/0.png labels/0.png",
        {"all": ("images/rgb", "labels")},
        ".png",
    ),
    "BDD100K": (
        "images/10k/train/0.jpg images/10k/val/1.jpg labels/sem_seg/colormaps/train/0.png "
        "labels/sem_seg/masks/train/0.png labels/sem_seg/masks/val/1.png",
        {
            "train": ("images/10k/train", "labels/sem_seg/masks/train"),
            "val": ("images/10k/val", "labels/sem_seg/masks/val"),
        },
        ".png",
    ),
    "Cityscapes, three label files": (
        "leftImg8bit/train/u/0_leftImg8bit.png gtFine/train/u/0_gtFine_color.png "
        "gtFine/train/u/0_gtFine_instanceIds.png "
        "gtFine/train/u/0_gtFine_labelIds.png leftImg8bit/val/v/1_leftImg8bit.png gtFine/val/v/1_gtFine_color.png "
        "gtFine/val/v/1_gtFine_instanceIds.png gtFine/val/v/1_gtFine_labelIds.png",
        {"train": ("leftImg8bit/train", "gtFine/train"), "val": ("leftImg8bit/val", "gtFine/val")},
        "_gtFine_labelIds.png",
    ),
    "train ids first": (
        "a_leftImg8bit.png a_gtFine_labelIds.png a_gtFine_labelTrainIds.png",
        {"all": (".", ".")},
        "_gtFine_labelTrainIds.png",
    ),
    "CVAT and VOC": (
        "JPEGImages/0.jpg SegmentationObject/0.png SegmentationClass/0.png",
        {"all": ("JPEGImages", "SegmentationClass")},
        ".png",
    ),
    "DRIVE": (
        "training/images/21_training.tif training/1st_manual/21_manual1.gif training/mask/21_training_mask.gif "
        "test/images/01_test.tif test/1st_manual/01_manual1.gif test/2nd_manual/01_manual2.gif "
        "test/mask/01_test_mask.gif",
        {"train": ("training/images", "training/1st_manual"), "val": ("test/images", "test/1st_manual")},
        "_manual1.gif",
    ),
    "CHASE": ("I_01L.jpg I_01L_1stHO.png I_01L_2ndHO.png", {"all": (".", ".")}, "_1stHO.png"),
    "HRF": ("images/01_h.jpg manual1/01_h.tif mask/01_h_mask.tif", {"all": ("images", "manual1")}, ".tif"),
    "FloodNet": (
        "train/train-org-img/1.jpg train/train-label-img/1_lab.png val/val-org-img/2.jpg val/val-label-img/2_lab.png",
        {
            "train": ("train/train-org-img", "train/train-label-img"),
            "val": ("val/val-org-img", "val/val-label-img"),
        },
        "_lab.png",
    ),
    "ISIC": (
        "I_Training_Data/I_1.jpg I_Training_Data/I_1_superpixels.png I_Training_GroundTruth/I_1_segmentation.png "
        "I_Validation_Data/I_2.jpg I_Validation_GroundTruth/I_2_segmentation.png",
        {
            "train": ("I_Training_Data", "I_Training_GroundTruth"),
            "val": ("I_Validation_Data", "I_Validation_GroundTruth"),
        },
        "_segmentation.png",
    ),
    "Carvana": ("train/a_01.jpg train_masks/a_01_mask.gif test/b.jpg", {"all": ("train", "train_masks")}, "_mask.gif"),
    "SUIM": (
        "train_val/images/a.jpg train_val/masks/a.bmp TEST/images/b.jpg TEST/masks/b.bmp",
        {"train": ("train_val/images", "train_val/masks"), "val": ("TEST/images", "TEST/masks")},
        ".bmp",
    ),
    "Mapillary": (
        "training/images/1.jpg training/labels/1.png training/instances/1.png training/panoptic/1.png "
        "validation/images/2.jpg validation/labels/2.png validation/instances/2.png testing/images/3.jpg",
        {"train": ("training/images", "training/labels"), "val": ("validation/images", "validation/labels")},
        ".png",
    ),
    "SYNTHIA": ("RGB/1.png GT/LABELS/1.png GT/COLOR/1.png Depth/1.png", {"all": ("RGB", "GT/LABELS")}, ".png"),
    "Potsdam": (
        "2_Ortho_RGB/top_2_10_RGB.tif 3_Ortho_IRRG/top_2_10_IRRG.tif 5_Labels_all/top_2_10_label.tif",
        {"all": ("2_Ortho_RGB", "5_Labels_all")},
        "_label.tif",
    ),
    "RUGD": (
        "RUGD_frames-with-annotations/creek/creek_1.png RUGD_annotations/creek/creek_1.png",
        {"all": ("RUGD_frames-with-annotations", "RUGD_annotations")},
        ".png",
    ),
    "iSAID": (
        "train/images/images/1.png train/Semantic_masks/images/images/1_instance_color_RGB.png "
        "val/images/images/2.png val/Semantic_masks/images/images/2_instance_color_RGB.png",
        {
            "train": ("train/images/images", "train/Semantic_masks/images/images"),
            "val": ("val/images/images", "val/Semantic_masks/images/images"),
        },
        "_instance_color_RGB.png",
    ),
    "two archives": (
        "leftImg8bit_trainvaltest/leftImg8bit/train/u/1_leftImg8bit.png "
        "gtFine_trainvaltest/gtFine/train/u/1_gt_ids.png "
        "leftImg8bit_trainvaltest/leftImg8bit/val/u/2_leftImg8bit.png gtFine_trainvaltest/gtFine/val/u/2_gt_ids.png",
        {
            "train": ("leftImg8bit_trainvaltest/leftImg8bit/train", "gtFine_trainvaltest/gtFine/train"),
            "val": ("leftImg8bit_trainvaltest/leftImg8bit/val", "gtFine_trainvaltest/gtFine/val"),
        },
        "_gt_ids.png",
    ),
    "other parents": ("raw/images/1.jpg annotated/masks/1.png", {"all": ("raw/images", "annotated/masks")}, ".png"),
    "Supervisely": (
        "ds/img/1.jpg ds/masks_machine/1.png ds/masks_human/1.png",
        {"all": ("ds/img", "ds/masks_machine")},
        ".png",
    ),
    "CamVid of 701 frames": (
        "701_StillsRaw_full/0001TP_1.png LabeledApproved_full/0001TP_1_L.png",
        {"all": ("701_StillsRaw_full", "LabeledApproved_full")},
        "_L.png",
    ),
    "KITTI": (
        "training/image_2/0_10.png training/semantic/0_10.png training/semantic_rgb/0_10.png "
        "training/instance/0_10.png",
        {"all": ("training/image_2", "training/semantic")},
        ".png",
    ),
    "GOOSE": (
        "images/train/s/1_windshield_vis.png images/train/s/1_windshield_nir.png labels/train/s/1_labelids.png "
        "labels/train/s/1_color.png images/val/s/2_windshield_vis.png labels/val/s/2_labelids.png",
        {"train": ("images/train", "labels/train"), "val": ("images/val", "labels/val")},
        "_labelids.png",
    ),
    "capitals between words": (
        "trainImages/1.jpg trainMasks/1.png valImages/2.jpg valMasks/2.png",
        {"train": ("trainImages", "trainMasks"), "val": ("valImages", "valMasks")},
        ".png",
    ),
    "other words in each split": (
        "TrainDataset/image/1.png TrainDataset/mask/1.png TestDataset/X/images/2.png TestDataset/X/masks/2.png",
        {
            "train": ("TrainDataset/image", "TrainDataset/mask"),
            "val": ("TestDataset/X/images", "TestDataset/X/masks"),
        },
        ".png",
    ),
    "folds": (
        "fold_0/train/images/1.png fold_0/train/masks/1.png fold_0/val/images/2.png fold_0/val/masks/2.png "
        "fold_1/train/images/2.png fold_1/train/masks/2.png fold_1/val/images/1.png fold_1/val/masks/1.png",
        {
            "train": ("fold_0/train/images", "fold_0/train/masks"),
            "val": ("fold_0/val/images", "fold_0/val/masks"),
        },
        ".png",
    ),
    "trainval beside train": (
        "train/images/1.png train/masks/1.png trainval/images/1.png trainval/masks/1.png trainval/images/2.png "
        "trainval/masks/2.png val/images/2.png val/masks/2.png",
        {"train": ("train/images", "train/masks"), "val": ("val/images", "val/masks")},
        ".png",
    ),
    "few ids beside colours": (  # a tenth is enough: a colour is never an id
        "images/1.jpg images/2.jpg images/3.jpg colormaps/1.png colormaps/2.png colormaps/3.png masks/1.png",
        {"all": ("images", "masks")},
        ".png",
    ),
    "hidden files": (
        "images/a_1.jpg annotations/trimaps/a_1.png annotations/trimaps/._a_1.png",
        {"all": ("images", "annotations/trimaps")},
        ".png",
    ),
    "composition of letters": ("images/e\u0301.jpg masks/\u00e9.png", {"all": ("images", "masks")}, ".png"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(tmp_path: Path, name: str) -> None:
    files, folders, ending = FOLDERS[name]
    found = look(tmp_path, files)
    assert found.folders == folders
    assert found.mask_suffix == ending
    assert found.pairs == {}
    assert found.several == 0
    opened = found.datasets(tmp_path, ["a", "b"])
    assert set(opened) == set(folders)
    assert all(len(each) and not each.unused_masks for each in opened.values()), "the data set finds the same pairs"


LISTS = {
    "LoveDA": (
        "Train/Rural/images_png/1.png Train/Rural/masks_png/1.png Train/Urban/images_png/0.png "
        "Train/Urban/masks_png/0.png Val/Rural/images_png/5.png Val/Rural/masks_png/5.png",
        {
            "train": [
                ("Train/Rural/images_png/1.png", "Train/Rural/masks_png/1.png"),
                ("Train/Urban/images_png/0.png", "Train/Urban/masks_png/0.png"),
            ],
            "val": [("Val/Rural/images_png/5.png", "Val/Rural/masks_png/5.png")],
        },
    ),
    "UAVid": (
        "uavid_train/seq1/Images/0.png uavid_train/seq1/Labels/0.png uavid_train/seq2/Images/0.png "
        "uavid_train/seq2/Labels/0.png uavid_val/seq9/Images/0.png uavid_val/seq9/Labels/0.png "
        "uavid_test/seq8/Images/0.png",
        {
            "train": [(f"uavid_train/seq{n}/Images/0.png", f"uavid_train/seq{n}/Labels/0.png") for n in (1, 2)],
            "val": [("uavid_val/seq9/Images/0.png", "uavid_val/seq9/Labels/0.png")],
        },
    ),
    "ACDC": (
        "rgb_anon/fog/train/G/1_rgb_anon.png gt/fog/train/G/1_gt_labelTrainIds.png gt/fog/train/G/1_gt_labelColor.png "
        "rgb_anon/fog/val/G/2_rgb_anon.png gt/fog/val/G/2_gt_labelTrainIds.png gt/fog/val/G/2_gt_labelColor.png "
        "rgb_anon/night/val/G/3_rgb_anon.png gt/night/val/G/3_gt_labelTrainIds.png",
        {
            "train": [("rgb_anon/fog/train/G/1_rgb_anon.png", "gt/fog/train/G/1_gt_labelTrainIds.png")],
            "val": [
                ("rgb_anon/fog/val/G/2_rgb_anon.png", "gt/fog/val/G/2_gt_labelTrainIds.png"),
                ("rgb_anon/night/val/G/3_rgb_anon.png", "gt/night/val/G/3_gt_labelTrainIds.png"),
            ],
        },
    ),
    "OpenEarthMap": (
        "O/a/images/a_1.tif O/a/labels/a_1.tif O/b/images/b_1.tif O/b/labels/b_1.tif "
        "O/train.txt=a_1.tif O/val.txt=b_1.tif",
        {
            "train": [("O/a/images/a_1.tif", "O/a/labels/a_1.tif")],
            "val": [("O/b/images/b_1.tif", "O/b/labels/b_1.tif")],
        },
    ),
    "YCOR": (
        "train/iid0/rgb.jpg train/iid0/labels.png valid/iid2/rgb.jpg valid/iid2/labels.png",
        {
            "train": [("train/iid0/rgb.jpg", "train/iid0/labels.png")],
            "val": [("valid/iid2/rgb.jpg", "valid/iid2/labels.png")],
        },
    ),
    "RELLIS-3D": (
        "0/node/f0.jpg 0/node_label_id/f0.png 0/node_label_color/f0.png 1/node/f0.jpg 1/node_label_id/f0.png",
        {"all": [(f"{n}/node/f0.jpg", f"{n}/node_label_id/f0.png") for n in (0, 1)]},
    ),
    "labelme's folders": (
        "a_json/img.png a_json/label.png a_json/label_viz.png b_json/img.png b_json/label.png b_json/label_viz.png",
        {"all": [(f"{n}_json/img.png", f"{n}_json/label.png") for n in "ab"]},
    ),
    "formats": (
        "images/1.jpg images/2.jpg masks/1.png masks/2.tif",
        {"all": [("images/1.jpg", "masks/1.png"), ("images/2.jpg", "masks/2.tif")]},
    ),
    "an ending for each split": (
        "train/images/a.jpg train/masks/a.png val/images/a.jpg val/masks/a_gt.png",
        {
            "train": [("train/images/a.jpg", "train/masks/a.png")],
            "val": [("val/images/a.jpg", "val/masks/a_gt.png")],
        },
    ),
    "shared masks": (
        "train/a.jpg val/b.jpg masks/a.png masks/b.png",
        {"train": [("train/a.jpg", "masks/a.png")], "val": [("val/b.jpg", "masks/b.png")]},
    ),
    "GTA5's lists": (
        "images/1.png images/2.png images/3.png labels/1.png labels/2.png labels/3.png "
        "train.txt=1.png;3.png val.txt=2.png",
        {
            "train": [("images/1.png", "labels/1.png"), ("images/3.png", "labels/3.png")],
            "val": [("images/2.png", "labels/2.png")],
        },
    ),
    "PaddleSeg's lists": (
        "a/0.jpg a/1.jpg b/x-0.png b/x-1.png train.txt=a/0.jpg~b/x-0.png val.txt=a/1.jpg~b/x-1.png test.txt=a/1.jpg",
        {"train": [("a/0.jpg", "b/x-0.png")], "val": [("a/1.jpg", "b/x-1.png")]},
    ),
    "HRNet's lists": (
        "i/0.png i/1.png l/0_x.png l/1_x.png list/cs/train.lst=i/0.png~~l/0_x.png list/cs/val.lst=i/1.png~l/1_x.png "
        "list/cs/test.lst=i/1.png",
        {"train": [("i/0.png", "l/0_x.png")], "val": [("i/1.png", "l/1_x.png")]},
    ),
    "PSPNet's lists": (
        "a/0.jpg a/1.jpg b/x-0.png b/x-1.png list/train_aug.txt=a/0.jpg~b/x-0.png list/val.txt=a/1.jpg~b/x-1.png",
        {"train": [("a/0.jpg", "b/x-0.png")], "val": [("a/1.jpg", "b/x-1.png")]},
    ),
    "a column of splits": (
        "a/0.jpg a/1.jpg b/x0.png b/x1.png meta.csv=image,split,mask;a/0.jpg,train,b/x0.png;a/1.jpg,valid,b/x1.png",
        {"train": [("a/0.jpg", "b/x0.png")], "val": [("a/1.jpg", "b/x1.png")]},
    ),
    "one CSV file": (
        "a/0.jpg a/1.jpg b/x0.png b/x1.png pairs.csv=image,mask;a/0.jpg,b/x0.png;a/1.jpg,b/x1.png",
        {"all": [("a/0.jpg", "b/x0.png"), ("a/1.jpg", "b/x1.png")]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_pairs_that_two_folders_do_not_hold(tmp_path: Path, name: str) -> None:
    files, pairs = LISTS[name]
    found = look(tmp_path, files)
    assert (found.folders, found.pairs, found.several) == ({}, pairs, 0)
    assert {split: len(each) for split, each in found.datasets(tmp_path, ["a", "b"]).items()} == {
        split: len(each) for split, each in pairs.items()
    }


@pytest.mark.parametrize(
    ("files", "lists"),
    [
        (
            "ImageSets/trn.txt=1 ImageSets/val.txt=2",
            {"train": "ImageSets/trn.txt", "val": "ImageSets/val.txt"},
        ),  # Aeroscapes
        (
            "lists/train_list.txt=1 lists/test_list.txt=2",
            {"train": "lists/train_list.txt", "val": "lists/test_list.txt"},
        ),
        ("Main/cat_train.txt=1~-1 Main/cat_val.txt=2~-1", {}),  # VOC's lists of objects
        ("train.txt=1;7 val.txt=2", {}),  # 7 is no image
    ],
)
def test_lists_of_names(tmp_path: Path, files: str, lists: dict[str, str]) -> None:
    found = look(tmp_path, "JPEGImages/1.jpg JPEGImages/2.jpg SegmentationClass/1.png SegmentationClass/2.png " + files)
    assert (found.folders, found.lists) == ({"all": ("JPEGImages", "SegmentationClass")}, lists)


def test_a_list_whose_paths_start_elsewhere_is_used(tmp_path: Path) -> None:
    files = "train/0001TP_1.png trainannot/0001TP_1.png val/0016E5_2.png valannot/0016E5_2.png"
    lines = {
        split: f"/S/{split}/{name}.png~/S/{split}annot/{name}.png"
        for split, name in (("train", "0001TP_1"), ("val", "0016E5_2"))
    }
    found = look(tmp_path, f"{files} train.txt={lines['train']} val.txt={lines['val']}")
    assert found.lists == {"train": "train.txt", "val": "val.txt"}
    assert "train.txt: paths are read without S/ before them" in found.notes
    assert found.published == "camvid"


def test_a_list_of_a_few_examples_is_not_used(tmp_path: Path) -> None:
    files = " ".join(f"images/{n}.jpg masks/{n}.png" for n in range(9))
    found = look(tmp_path, f"{files} examples.csv=image,mask;images/3.jpg,masks/3.png")
    assert (found.folders, found.pairs) == ({"all": ("images", "masks")}, {})


def test_a_list_with_missing_files_is_not_used_itself(tmp_path: Path) -> None:
    found = look(tmp_path, "a/0.jpg b/x0.png train.txt=a/0.jpg~b/x0.png;a/1.jpg~b/x1.png")
    assert (found.pairs, found.lists) == ({"all": [("a/0.jpg", "b/x0.png")]}, {})
    assert any("line 2: 'a/1.jpg b/x1.png': no such files" in note for note in found.notes)


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ("images/1.jpg masks_ann/1.png masks_bob/1.png", ["masks_ann and masks_bob", "--masks masks_ann"]),
        ("images/1.jpg labels-ah/1.ah.png labels-vk/1.vk.png", ["labels-ah and labels-vk", "--masks"]),
        ("images_a/1.jpg images_b/1.jpg masks/1.png", ["images_a and images_b", "--images images_a"]),
        ("train/A/1.png train/B/1.png train/label/1.png", ["train/A and train/B", "--images"]),  # LEVIR-CD
        ("scene_a/images/0.png scene_b/labels/0.png", ["different scenes", "scene_a/images/0.png", "data.train.pairs"]),
        ("01/images/0.png 02/labels/0.png", ["different scenes"]),
        ("cat/1.png dog/1.png", ["images, but no masks"]),
    ],
)
def test_what_is_not_chosen_is_named(tmp_path: Path, files: str, parts: list[str]) -> None:
    with pytest.raises(DataError) as error:
        look(tmp_path, files)
    assert len(str(error.value).splitlines()) <= 3
    for part in parts:
        assert part in str(error.value)


def test_the_user_chooses(tmp_path: Path) -> None:
    files = "images/1.jpg masks_ann/1.png masks_bob/1.png masks_bob/1_small.png"
    assert look(tmp_path, files, masks="masks_bob").folders == {"all": ("images", "masks_bob")}
    assert look(tmp_path, files, masks="_small.png").mask_suffix == "_small.png"
    rgb = look(tmp_path, "rgb/1.png ir/1.png labels/1.png", images="ir", masks="labels")
    assert rgb.folders == {"all": ("ir", "labels")}
    with pytest.raises(DataError, match="--masks gone: neither a folder nor an ending"):
        look(tmp_path, files, masks="gone")


@pytest.mark.parametrize(
    ("files", "several", "ending"),
    [
        ("images/0.jpg masks/0_m0_1.png masks/0_m1_2.png images/1.jpg masks/1_m0_1.png", 1, "_m0_1.png"),
        ("b/a?(1).png b/a?(1)_mask.png b/a?(1)_mask_1.png b/a?(2).png b/a?(2)_mask.png", 1, "_mask.png"),  # BUSI
        ("a.jpg a_road.png a_car.png", 1, "_car.png"),
        ("i/1_leftImg8bit.png gt/1_gt_labelids.png gt/1_gt_level3Ids.png", 1, "_gt_labelids.png"),  # IDD
        ("a.jpg a_mask.png a_depth.png a_overlay.png", 0, "_mask.png"),
    ],
)
def test_several_masks_of_an_image_are_counted(tmp_path: Path, files: str, several: int, ending: str) -> None:
    found = look(tmp_path, files)
    assert found.several == several
    assert found.mask_suffix == ending
    if several:
        text = str(several_error(tmp_path, found))
        assert f"--masks {ending}" in text
        assert len(text.splitlines()) == 3
        assert all(name in text for name in found.example[1:])  # type: ignore[index]


def test_jpeg_masks_on_request(tmp_path: Path) -> None:
    """Kvasir-SEG."""
    files = "Kvasir-SEG/images/a.jpg Kvasir-SEG/masks/a.jpg"
    with pytest.raises(DataError, match="a mask in JPEG format"):
        look(tmp_path, files)
    assert look(tmp_path, files, jpeg=True).folders == {"all": ("Kvasir-SEG/images", "Kvasir-SEG/masks")}


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ("images/1.jpg images/2.jpg masks/1.npy", "masks/1.npy has the name of an image, but .npy is not read"),
        ("data.zip readme.txt", "unpack data.zip first"),
        ("a/1.jpg b/x.png train.txt=a/1.jpg~b/x.png;a/1.jpg~b/x.png", "train.txt: line 2: .* is in line 1 too"),
        ("a/1.jpg b/x.png train.txt=a/1.jpg~../c/x.png", "train.txt: line 1: .* do not exist"),
    ],
)
def test_what_is_there_instead_of_masks_is_named(tmp_path: Path, files: str, part: str) -> None:
    with pytest.raises(DataError, match=part):
        look(tmp_path, files)


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    files = "images/1.jpg masks/1.png images/2.heic images/3.HEIC images/4.cr2 images/notes.txt depth/1.png"
    notes = look(tmp_path, files).notes
    assert "other folders with pictures, not used: depth" in notes
    lists = look(tmp_path / "s", "a/images/0.png a/labels/0.png b/images/0.png b/labels/0.png b/images/1.png").notes
    assert "images without mask, not used: 1 (b/images/1.png)" in lists


def test_endings_of_images(tmp_path: Path) -> None:
    assert look(tmp_path / "a", "images/1.jpg masks/1.png").image_suffixes == IMAGE_SUFFIXES
    assert look(tmp_path / "b", "images/1.jpg images/1_x.png masks/1.png").image_suffixes == (".jpg",)
    assert look(tmp_path / "c", "images/1.ppm masks/1.pgm").image_suffixes == (".ppm",)
    assert look(tmp_path / "d", "1_sat.jpg 1_mask.png").image_suffixes == ("_sat.jpg",)


def test_many_scenes_are_not_compared_with_one_another(tmp_path: Path) -> None:
    files = (
        " ".join(f"s{n}/images/0.png s{n}/labels/0.png" for n in range(0, 60, 2)) + " s1/images/0.png s3/labels/0.png"
    )
    found = look(tmp_path, files)
    assert len(found.pairs["all"]) == 30
    assert all(image.partition("/")[0] == mask.partition("/")[0] for image, mask in found.pairs["all"])
