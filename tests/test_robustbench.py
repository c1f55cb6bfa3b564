"""The RobustBench entry: their fields and types, and nothing in them that was not measured or told."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from robustflow import UserError, evaluate
from robustflow.bracket import Bracket
from robustflow.robustbench import model_info

# An entry of their list of CIFAR-10, L2 (model_info/cifar10/L2/Wang2023Better_WRN-70-16.json), read 2026: its types.
THEIRS: dict[str, type] = {
    "link": str, "name": str, "authors": str, "additional_data": bool, "number_forward_passes": int, "dataset": str,
    "venue": str, "architecture": str, "eps": str, "clean_acc": str, "reported": str, "autoattack_acc": str,
    "footnote": str,
}  # fmt: skip
# Those of the data class that their benchmark() fills and writes, beside the above.
CORRUPTIONS = {"corruptions_acc", "corruptions_acc_3d", "corruptions_mce", "corruptions_mce_3d"}
TOLD: dict[str, Any] = {
    "link": "https://example.org", "name": "A line", "authors": "Nobody", "additional_data": False,
    "number_forward_passes": 1, "venue": "None, 2026", "architecture": "linear", "reported": "33.33",
}  # fmt: skip


def line(x: Tensor) -> Tensor:
    """Decides by the mean of the pixels, at 1/2."""
    return torch.stack([x.flatten(1).sum(1) - 2, 2 - x.flatten(1).sum(1)], 1)


@pytest.fixture(scope="module")
def bracket() -> Bracket:
    # Distances to the boundary: 2·|mean − 1/2| = 0.8, 0.4, 0.04; the last two are of the other class.
    images = torch.tensor([0.9, 0.7, 0.48, 0.2, 0.1, 0.9, 0.9])[:, None, None, None].expand(7, 1, 2, 2)
    return evaluate(line, images, [0, 0, 1, 1, 0, 1, 1], [0.1, 0.5], "deepfool")


def test_figures_by_hand(bracket: Bracket) -> None:
    # Right: 4 of 7; beyond 0.5: 0.9 (0.8) and 0.2 (0.6).
    info = model_info(bracket, dataset="cifar10")
    assert (info["clean_acc"], info["external"], info["eps"]) == ("57.14", "28.57", "0.5")
    assert info["autoattack_acc"] is None, "DeepFool is not AutoAttack"
    assert model_info(bracket, epsilon=0.1)["external"] == "42.86"
    assert "n = 7" in info["footnote"]
    assert "deepfool" in info["footnote"]


def test_only_autoattack_is_called_autoattack(bracket: Bracket) -> None:
    import dataclasses

    info = model_info(dataclasses.replace(bracket, attacks="autoattack"), dataset="cifar10", **TOLD)
    assert info["autoattack_acc"] == "28.57"
    assert "external" not in info
    assert set(info) == set(THEIRS) | CORRUPTIONS
    assert {key: type(value) for key, value in info.items() if key not in CORRUPTIONS} == THEIRS
    assert {info[key] for key in CORRUPTIONS} == {None}
    both = model_info(dataclasses.replace(bracket, attacks="standard,autoattack"))
    assert both["autoattack_acc"] is None


def test_what_nobody_said_is_null(bracket: Bracket) -> None:
    info = json.loads(json.dumps(model_info(bracket)))
    assert {key for key, value in info.items() if value is not None} == {"eps", "clean_acc", "external", "footnote"}
    assert not [key for key in info if "certified" in key], "they have no field for it"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.3}, "ε = 0.3 was not evaluated (0.1, 0.5 were)"),
        ({"clean_acc": "99"}, "no field 'clean_acc' to be told"),
        ({"additional_data": 1}, "additional_data must be bool, not int"),
        ({"number_forward_passes": True}, "number_forward_passes must be int, not bool"),
        ({"reported": 84.0}, "reported must be str"),
    ],
)
def test_wrong_fields_are_one_line(bracket: Bracket, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        model_info(bracket, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
