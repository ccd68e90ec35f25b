"""What a resumed run may change in its recipe, and the values of a recipe by dotted key."""

from typing import Any

# Recipe keys that a resumed run may change, each with how this changes the results. All other changes are refused.
FREE_KEYS = {
    "name": "",  # a label
    "data.root": "",  # where the data are: the fingerprint checks their names and sizes
    # Where the lists of names and pairs are: as with data.root.
    **{f"data.{split}.{key}": "" for split in ("train", "val") for key in ("names", "pairs")},
    "data.cache": "",  # the same pixels, from memory
    "train.workers": "",  # a sample depends only on the seed and its position
    "train.prefetch": "",  # the same batches, earlier on the device
    "train.checkpointing": "",  # the same gradients, with activations that are computed twice
    "train.log_every": "",
    "train.save_every": "",
    "train.keep": "",
    "train.eval_every": "",  # evaluation draws no random number and writes no buffer; other weights may become the best
    "train.patience": "",  # decides when training ends, not what is learnt before
    # What to do if something is not finite. This may have stopped the run: then the user must be able to choose.
    "train.nonfinite": "",
    "train.max_skipped": "",
    # Other kernels that compute the same.
    "train.compile": "equal except for rounding",
    "train.deterministic": "equal except for rounding",
    # This changes results, but a long run must be able to continue with less memory. A step's batch and losses stay.
    "train.micro_batch": "BatchNorm sees other groups of images from here on",
}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings, by dotted key."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: list(tree) if isinstance(tree, tuple) else tree}
    return {
        key: leaf for name, inner in tree.items() for key, leaf in flat(inner, f"{prefix}.{name}".lstrip(".")).items()
    }
