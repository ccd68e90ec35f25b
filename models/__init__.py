"""Networks and classifiers by name, and their checkpoints.

>>> model = build_model("seaformer_t", num_classes=8)
>>> logits = model(torch.randn(1, 3, 64, 64))  # (1, 8, 8, 8)
"""

from ssaseg.models.build import CLASSIFIERS, build_model, facts, list_mask_models, list_models
from ssaseg.models.checkpoint import load_model, save_model
from ssaseg.models.classifiers.base import Classifier, LossOptions
from ssaseg.models.header import CheckpointError
from ssaseg.models.segmenter import Segmenter

__all__ = [
    "CLASSIFIERS",
    "CheckpointError",
    "Classifier",
    "LossOptions",
    "Segmenter",
    "build_model",
    "facts",
    "list_mask_models",
    "list_models",
    "load_model",
    "save_model",
]
