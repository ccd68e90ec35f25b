"""`train.checkpointing`: the same gradients, by blocks that run twice."""

import pytest
import torch
from torch import nn

from ssaseg.cli.errors import CommandError
from ssaseg.cli.training.build import build_network, turn_on_checkpointing
from ssaseg.models.layers import Checkpointed, DropPath
from ssaseg.models.networks import segformer, swin, vit_adapter
from ssaseg.recipes import load_recipe

BLOCKS = (segformer.Block, swin.Block, vit_adapter.Block, vit_adapter.Injector, vit_adapter.Extractor)


def small(name: str) -> nn.Module:
    """A backbone with DropPath at 0.5, much smaller than any variant."""
    if name == "segformer":
        return segformer.MiT(segformer.Variant(8, (1, 1, 1, 2)), 0.5)
    if name == "swin":
        return swin.Swin(swin.Variant(12, (1, 1, 2, 1), (1, 1, 2, 2)), 0.5)
    return vit_adapter.ViTAdapter(vit_adapter.Variant(24, 4, 2, 2, 0.5, 0.5, 4))


@pytest.mark.parametrize(("name", "blocks"), [("segformer", 5), ("swin", 5), ("vit_adapter", 4 + 4 + 6)])
def test_blocks_run_twice_and_gradients_stay_the_same(name: str, blocks: int, one_thread: None) -> None:
    """To the last bit, with DropPath, and in bfloat16."""
    torch.manual_seed(0)
    backbone, images, runs = small(name), torch.randn(2, 3, 64, 64), 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    for module in backbone.modules():
        if isinstance(module, BLOCKS):
            module.register_forward_pre_hook(count)
        if isinstance(module, vit_adapter.Injector):
            nn.init.ones_(module.scale)  # at 0, gradients do not reach what is injected
    assert any(module.rate == 0.5 for module in backbone.modules() if isinstance(module, DropPath))
    gradients: list[dict[str, torch.Tensor]] = []
    for times in (1, 2):
        backbone.train().zero_grad()
        torch.manual_seed(1)
        runs = 0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = sum(each.float().square().sum() for each in backbone(images))
        torch.manual_seed(2)  # the second pass must not take its numbers from here
        loss.backward()
        assert runs == blocks * times
        gradients.append({key: each.grad for key, each in backbone.named_parameters() if each.grad is not None})
        turn_on_checkpointing(backbone)  # type: ignore[arg-type]
    assert len(gradients[0]) > 50
    assert all(torch.equal(gradient, gradients[1][key]) for key, gradient in gradients[0].items())
    runs = 0
    with torch.no_grad():
        backbone(images)
    assert runs == blocks


@pytest.mark.parametrize("name", ["segformer_b0", "upernet_swin_t", "upernet_vit_adapter_t"])
def test_the_recipes_key_turns_it_on(name: str) -> None:
    for value in (False, True):
        recipe = load_recipe("demo", [f"model.name={name}", f"train.checkpointing={str(value).lower()}"])
        with torch.device("meta"):
            network = build_network(recipe, ["a", "b"])
        modules = [module for module in network.modules() if isinstance(module, Checkpointed)]
        assert [module.checkpointing for module in modules] == [value] * len(modules) != []


def test_networks_without_such_blocks_name_the_key() -> None:
    recipe = load_recipe("demo", ["model.name=seaformer_t", "train.checkpointing=true"])
    with (
        torch.device("meta"),
        pytest.raises(CommandError, match=r"^train\.checkpointing: true: not possible with seaformer_t\n") as caught,
    ):
        build_network(recipe, ["a", "b"])
    assert len(str(caught.value).splitlines()) == 3
