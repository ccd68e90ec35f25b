"""The networks of other programs for networks.py, with our weights where these have the program's names."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NOT_LEARNT = ("relative_position_index", "num_batches_tracked")
# mmsegmentation's configurations, by the start of our network's name.
CONFIGS = {
    "segnext_": "segnext/segnext_mscan-{}_1xb16-adamw-160k_ade20k-512x512.py",
    "fcn_": "fcn/fcn_{}-d8_4xb4-80k_ade20k-512x512.py",
    "ocrnet_": "ocrnet/ocrnet_{}_4xb4-80k_ade20k-512x512.py",
}
PEER_OF = dict.fromkeys(CONFIGS, "mmseg") | {"segformer_b0": "transformers", "upernet_swin_t": "transformers"}


def peer_of(model: str) -> str | None:
    """The program that our network is compared with."""
    return next((peer for start, peer in PEER_OF.items() if model.startswith(start)), None)


def peer_network(side: str, case: Any, weights: str | None) -> tuple[nn.Module, float]:
    """The peer's network in evaluation mode, and the share of its tensors that have the values of ours, from a file."""
    torch.manual_seed(0)
    network = (mmseg_network if side == "mmseg" else transformers_network)(case).eval().requires_grad_(False)
    wanted = {key: value for key, value in network.state_dict().items() if not key.endswith(NOT_LEARNT)}
    share = 0.0
    for tensors in (torch.load(weights) if weights else {}).values():
        known = {key: value for key, value in tensors.items() if key in wanted and value.shape == wanted[key].shape}
        if len(known) > share * len(wanted):
            network.load_state_dict(known, strict=False)
            share = len(known) / len(wanted)
    return network, share


def mmseg_network(case: Any) -> nn.Module:
    """mmsegmentation's network, from the configuration in its package; without SyncBN, since there is one process."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fixtures"))
    from make_mmseg_stub import stub_mmcv_ops

    stub_mmcv_ops()
    import mmseg
    from mmengine import Config
    from mmengine.model import revert_sync_batchnorm
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    register_all_modules()
    start = next(start for start in CONFIGS if case.model.startswith(start))
    file = CONFIGS[start].format(case.model.removeprefix(start))
    config = Config.fromfile(Path(mmseg.__file__).parent / ".mim" / "configs" / file).model
    config.pretrained = config.backbone.init_cfg = config.data_preprocessor = config.auxiliary_head = None
    for head in config.decode_head if isinstance(config.decode_head, list) else [config.decode_head]:
        head.num_classes = case.classes
    network = revert_sync_batchnorm(MODELS.build(config))
    network.forward = network._forward  # backbone and heads, without upsampling
    return network


class Logits(nn.Module):
    """A network of transformers; returns its logits only, at the size of the feature, as ours."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        if hasattr(network, "auxiliary_head"):
            network.auxiliary_head = None

    def forward(self, images: Tensor) -> Tensor:
        if not hasattr(self.network, "backbone"):
            return self.network(images).logits
        # UPerNet would also bring its logits to the size of the image.
        return self.network.decode_head(self.network.backbone.forward_with_filtered_kwargs(images).feature_maps)

    def state_dict(self, *args: Any, **given: Any) -> Any:
        """With the names of the network's files."""
        return self.network.state_dict(*args, **given)

    def load_state_dict(self, *args: Any, **given: Any) -> Any:
        return self.network.load_state_dict(*args, **given)


def transformers_network(case: Any) -> nn.Module:
    """transformers' SegFormer-B0 or UPerNet-Swin-T."""
    import transformers

    if case.model.startswith("segformer_b0"):
        config = transformers.SegformerConfig(num_labels=case.classes)
        return Logits(transformers.SegformerForSemanticSegmentation(config))
    swin = transformers.SwinConfig(out_features=[f"stage{k}" for k in range(1, 5)])
    config = transformers.UperNetConfig(backbone_config=swin, num_labels=case.classes)
    return Logits(transformers.UperNetForSemanticSegmentation(config))


def versions(side: str) -> dict[str, str]:
    """Of the peer and of its PyTorch."""
    import importlib.metadata

    name = {"mmseg": "mmsegmentation"}.get(side, side)
    return {name: importlib.metadata.version(name), f"{name}'s torch": torch.__version__}
