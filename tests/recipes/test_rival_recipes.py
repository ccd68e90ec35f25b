"""Recipes of the rival classifiers: those of the plain classifier, with another classifier."""

import pytest

from ssaseg.models import facts
from ssaseg.recipes import list_recipes, load_recipe, recipe_file

NETWORKS = ("fcn_r101", "upernet_swin_b", "ocrnet_hr48", "segnext_t", "seaformer_b")
OPTIONS = {"cac": {}, "protoseg": {}, "gmmseg": {"components": 8}, "dnc": {}}
CASES = [(network, rival) for network in NETWORKS for rival in OPTIONS]


@pytest.mark.parametrize(("network", "rival"), CASES)
def test_only_the_classifier_differs_from_the_plain_recipe(network: str, rival: str) -> None:
    plain, found = (load_recipe(f"ade20k-{network}-{kind}", [], facts).model_dump() for kind in ("linear", rival))
    assert found["model"] == plain["model"] | {"classifier": rival, "options": OPTIONS[rival]}
    assert {key: value for key, value in found.items() if key not in ("name", "model")} == {
        key: value for key, value in plain.items() if key not in ("name", "model")
    }
    header = recipe_file(f"ade20k-{network}-{rival}").read_text().partition("extends:")[0]
    assert f"ssaseg train ade20k-{network}-{rival}\n" in header
    assert "no configuration was published" in header
    assert ("without reference" in header) == (rival == "dnc")
    assert ("9.8 GB" in header) == (rival == "gmmseg")


def test_no_recipe_of_a_rival_is_missed() -> None:
    found = {name for name in list_recipes() if name.rpartition("-")[2] in OPTIONS}
    assert found == {f"ade20k-{network}-{rival}" for network, rival in CASES}
