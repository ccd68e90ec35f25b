"""Names in the files of the mask methods' authors."""

import re


def in_detectron2(name: str, key: str) -> str:
    """The name that the authors' file of network `name` has for an official name."""
    if name == "yoso_r50":
        key = re.sub(r"^pixel_decoder\.", "yoso_neck.", re.sub(r"^predictor\.", "yoso_head.", key))
    elif not key.startswith("backbone."):
        key = f"sem_seg_head.{key}"
    if not key.startswith("backbone."):
        return key
    key = re.sub(r"\bbn(\d)\b", r"conv\1.norm", key)
    key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    block = re.match(r"backbone\.layer(\d)(.*)", key)
    return f"backbone.res{int(block[1]) + 1}{block[2]}" if block else key.replace("backbone.", "backbone.stem.")
