"""Learning PDEs from pictures: data, exact networks, figures and plots against truths from elsewhere, on tiny grids."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustflow import cli
from robustflow.errors import UserError
from robustflow.structured import pixel_networks
from robustflow.structured.finite_elements import apply_symbol, multiplier
from robustflow.structured.pixel_networks import (
    ALPHA,
    SPACING,
    Differences,
    PixelField,
    PixelNetwork,
    fit,
    hand_built,
    network,
    repeated,
)
from robustflow.structured.pixels import ADVECTION, FISHER, HEAT, SYSTEMS, Pixels, states
from robustflow.structured.systems import checked

TINY = {"grid": 40, "steps": 6}
ALL = pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.set_default_dtype(before)


def rolled(equation: str, u: Tensor) -> Tensor:
    """The finite differences once more, from indices."""
    n = u.shape[-1]
    right, left = (torch.arange(n) + 1) % n, (torch.arange(n) - 1) % n
    if equation == "advection":
        return -(u[..., right] - u[..., left] + u[..., right, :] - u[..., left, :]) / (2 * SPACING)
    diffused = ALPHA * (u[..., right] + u[..., left] + u[..., right, :] + u[..., left, :] - 4 * u) / SPACING**2
    return diffused + u - u * u if equation == "fisher" else diffused


@ALL
def test_the_hand_built_network_is_the_finite_difference(system: Pixels) -> None:
    u = torch.randn(3, 1, 20, 20)
    wanted = rolled(system.equation, u)
    for found in (hand_built(system.equation)(u), Differences(system.equation)(u)):
        assert float((found - wanted).norm() / wanted.norm()) < 1e-14


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 8)])
def test_blocks_compute_the_same_convolutions(power: int, size: tuple[int, int]) -> None:
    field, u = PixelField(3, power=power, scale=2.5, outer_bias=True), torch.randn(2, 1, *size)
    assert field.inner.bias is not None
    assert field.outer.bias is not None
    hidden = torch.zeros(2, 3, *size)
    for p in range(-2, 3):
        for q in range(-2, 3):
            moved = u.roll((-p, -q), dims=(-2, -1))
            hidden = hidden + field.inner.weight[:, 0, p + 2, q + 2, None, None] * moved
    hidden = (hidden + field.inner.bias[:, None, None]).clamp_min(0) ** power
    wanted = field.outer.bias.expand(2, 1, 1, 1)
    for p in range(-2, 3):
        for q in range(-2, 3):
            moved = hidden.roll((-p, -q), dims=(-2, -1))
            wanted = wanted + (field.outer.weight[0, :, p + 2, q + 2, None, None] * moved).sum(1, keepdim=True)
    torch.testing.assert_close(field(u), 2.5 * wanted, rtol=1e-13, atol=1e-13)


@ALL
def test_data_are_the_source_s_waves_and_the_same_for_the_same_arguments(system: Pixels) -> None:
    test = system.data("test", 3, 4, TINY)
    assert test.inputs.shape == (4, 1, 40, 40)
    assert test.targets.shape == (4, 40, 1, 40, 40), "always the whole horizon"
    assert torch.equal(test.inputs, system.data("test", 5, 4, TINY).inputs)
    train = [system.data("train", seed, 4, TINY) for seed in (0, 0, 1)]
    assert train[0].targets.shape[1] == 6
    assert torch.equal(train[0].targets, train[1].targets)
    assert not torch.equal(train[0].inputs, train[2].inputs)
    assert not torch.equal(train[0].inputs, system.data("validation", 0, 4, TINY).inputs)
    full = system.data("train", 0, 30, {"grid": 100, "steps": 1}).inputs
    spectrum = torch.fft.fft2(full - system.offset).abs()[:, 0]
    powers = {tuple(k) for k in (spectrum > 1e-6).nonzero()[:, 1:].tolist()}
    low, high = system.waves
    folded = {min(k, 100 - k) for pair in powers for k in pair}
    assert folded == set(range(low, high + 1))
    assert float((full - system.offset).abs().max()) == pytest.approx(1.0, abs=0.02)


def test_a_smaller_torus_has_the_same_pixels() -> None:
    """A wave of the unit square that is periodic on the half of it decays, reacts and moves there as on the whole."""
    x = torch.arange(100) * SPACING
    whole = 1 + torch.sin(2 * math.pi * 6 * x)[:, None] * torch.cos(2 * math.pi * 8 * x)
    for system in SYSTEMS:
        small, large = system.solution(whole[None, :50, :50], 3), system.solution(whole[None], 3)
        torch.testing.assert_close(small, large[..., :50, :50], rtol=0, atol=1e-12)


class Multiplier(nn.Module):
    """The finite elements themselves."""

    def __init__(self, system: Pixels) -> None:
        super().__init__()
        self.system = system

    def forward(self, u: Tensor) -> Tensor:
        side = u.shape[-1] * SPACING
        if self.system.equation == "heat":
            return apply_symbol(multiplier("heat", u.shape[-1], self.system.step, ALPHA / side**2), u)
        return apply_symbol(multiplier("advection", u.shape[-1], self.system.step / side), u)


@pytest.mark.parametrize("system", [HEAT, ADVECTION], ids=lambda system: system.name)
def test_the_exact_map_has_no_error_and_the_equation_s_noise_gain(system: Pixels) -> None:
    test, exact = system.data("test", 0, 6, TINY), Multiplier(system)
    measured = system.measure(exact, test)
    for k in (1, 10, 20, 39):
        assert measured.figures[f"relative error, step {k}"] < 1e-12
    assert measured.figures["max error, step 39"] < 1e-12
    if system is ADVECTION:
        assert measured.figures["noise gain, 40 steps"] == pytest.approx(1.0, abs=1e-12), "an isometry"
        assert measured.figures["norm drift, 40 steps"] < 1e-13
    else:  # white noise has the same size in every mode
        gains = multiplier("heat", 40, system.step, ALPHA / 0.16).abs() ** 80
        twice = torch.full((21,), 2.0)
        twice[[0, -1]] = 1.0
        expected = math.sqrt(float((gains * twice).sum()) / 1600)
        assert measured.figures["noise gain, 40 steps"] == pytest.approx(expected, rel=0.2)


class Half(nn.Module):
    def forward(self, u: Tensor) -> Tensor:
        return 0.5 * u


def test_figures_of_a_map_whose_errors_are_known() -> None:
    test = HEAT.data("test", 0, 4, TINY)
    figures = HEAT.measure(Half(), test).figures
    norms = test.targets.flatten(2).norm(dim=2)
    start = test.inputs.flatten(1).norm(dim=1)
    # A wave of the heat equation keeps its shape: U* = λᵏU, and the prediction is 2⁻ᵏU.
    for k in (1, 10, 39):
        expected = (1 - start * 0.5**k / norms[:, k - 1]).abs().mean()
        assert figures[f"relative error, step {k}"] == pytest.approx(float(expected), rel=1e-9)
    assert figures["noise gain, 40 steps"] == pytest.approx(0.5**40, rel=1e-9)
    largest = (test.targets[:, 38] - 0.5**39 * test.inputs).abs().amax((1, 2, 3)).mean()
    assert figures["max error, step 39"] == pytest.approx(float(largest), rel=1e-9)


@ALL
def test_the_parts_of_the_error(system: Pixels) -> None:
    """Space alone, space and time, all three: exact pieces of the models of which each has only some."""
    test = system.data("test", 0, 4, TINY)
    exact = system.measure(system.differences(), test).figures
    assert exact["one step: of F"] == 0
    assert exact["one step: of time"] < 1e-12
    assert exact["one step: of space"] == pytest.approx(exact["one step: whole error"], rel=1e-9)
    euler = system.prepared()["hand-built"]
    figures = system.measure(euler, test).figures
    assert figures["F − finite differences, relative"] < 2e-14
    assert figures["one step: of F"] < 1e-14
    assert figures["one step: of time"] > 1e-4
    field = hand_built(system.equation)
    field.outer.weight += 0.01 * torch.randn_like(field.outer.weight)
    wrong = repeated(field, "explicit-euler", system.step, 3)
    figures = system.measure(wrong, test).figures
    parts = [figures[f"one step: of {part}"] for part in ("space", "time", "F")]
    assert figures["one step: whole error"] <= sum(parts) * (1 + 1e-12)
    assert figures["one step: of F"] > 1e-7
    # δt·exp(Lip(F)δt)·sup‖F_θ − F‖, over the states of the three substeps.
    visited = [test.inputs]
    for layer in wrong:
        visited.append(layer(visited[-1]))
    gap = max(float(((field(u) - rolled(system.equation, u)).flatten(1).norm(dim=1)).max()) for u in visited)
    lipschitz = {"heat": 800, "advection": 200, "fisher": 803}[system.equation]  # of F, on |u| ≤ 1
    bound = system.step * math.exp(lipschitz * system.step) * gap
    apart = (wrong(test.inputs) - euler(test.inputs)).flatten(1).norm(dim=1)
    assert float(apart.max()) <= bound


def test_substeps_are_one_layer_and_sizes_are_the_source_s() -> None:
    for options, count in (({}, 102), ({"hidden": 10, "power": 2, "outer_bias": True}, 511)):
        flow = network(PixelNetwork(**options), 0.0024, 3.0)
        assert len(flow) == 3
        assert flow[0] is flow[1] is flow[2]
        assert sum(p.numel() for p in flow.parameters() if p.requires_grad) == count
        assert float(flow[0].step_size) == 0.0024 / 3
    torch.set_default_dtype(torch.float32)
    assert float(HEAT.differences("rk4", 3)[0].step_size) == HEAT.step / 3, "not rounded to the default"


@pytest.mark.parametrize("method", ["norm-exact-euler", "norm-exact-heun", "cayley"])
def test_the_norm_preserving_form_keeps_the_norm_and_the_plain_one_does_not(method: str) -> None:
    train, test = ADVECTION.data("train", 0, 3, TINY), ADVECTION.data("test", 0, 3, TINY)
    model = ADVECTION.build({"norm": True, "method": method}, train)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.02 * torch.randn_like(parameter)
    u = states(model, test.inputs, 40)
    drift = (u.flatten(2).norm(dim=2) / test.inputs.flatten(1).norm(dim=1, keepdim=True) - 1).abs()
    assert float(drift.max()) <= 1e-13
    assert ADVECTION.measure(model, test).figures["norm drift, 40 steps"] <= 1e-13
    assert ADVECTION.measure(ADVECTION.build({}, train), test).figures["norm drift, 40 steps"] > 1e-6
    with pytest.raises(UserError, match="is not norm-preserving"):
        ADVECTION.build({"norm": True, "method": "explicit-euler"}, train)
    with pytest.raises(UserError, match="advection network: unknown key 'width'"):
        ADVECTION.build({"width": 3}, train)


def test_the_fit_finds_a_linear_map_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """U₁ = ½U + ¼(U moved): with A the identity it is a network, and is found from fields that do not show it."""
    monkeypatch.setattr(pixel_networks, "NOISE_OF_A", 0.0)

    def moved(u: Tensor) -> Tensor:
        return 0.5 * u + 0.25 * u.roll(2, -1)

    u, new = torch.randn(64, 1, 20, 20), 0.5 * torch.randn(2, 1, 20, 20)
    for options in (PixelNetwork(kind="direct"), PixelNetwork(substeps=1, outer_bias=True)):
        model = network(options, 0.1)
        fit(model, u, moved(u), 0.1, 1e-9)
        assert float((model(new) - moved(new)).norm() / new.norm()) < 1e-6
        # Uniform noise of ± half the size of the data: Wiener's filter, smaller by the factor 1/(1 + ¼/3).
        fit(model, u, moved(u), 0.1, 0.5)
        share = float((model(new) * moved(new)).sum() / moved(new).square().sum())
        assert share == pytest.approx(12 / 13, abs=0.02)


@ALL
def test_what_begins_at_the_fit_predicts_better_than_finite_differences(system: Pixels) -> None:
    train, test = system.data("train", 0, 8, TINY), system.data("test", 0, 4, TINY)
    options = {"hidden": 10, "power": 2, "outer_bias": True} if system is FISHER else {}
    found = system.measure(system.build(options, train), test).figures["relative error, step 1"]
    hand = system.measure(system.prepared()["hand-built"], test).figures["relative error, step 1"]
    assert found < 0.3 * hand


def test_of_several_first_layers_the_best_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = network(PixelNetwork(), 0.1), []

    def fitted(model: nn.Module, field: PixelField, start: Tensor, *rest: object) -> float:
        seen.append((len(start), field.inner.weight.clone()))
        return [5.0, math.nan, 2.0, 3.0, 7.0, 2.5, 9.0, 2.1, 0.0][len(seen) - 1]

    monkeypatch.setattr(pixel_networks, "_fitted", fitted)
    u = torch.randn(16, 1, 20, 20)
    fit(model, u, 0.5 * u, 0.1, 1e-3)
    assert [count for count, _ in seen] == [2] * 8 + [16]
    assert torch.equal(seen[-1][1], seen[2][1])
    assert not torch.equal(seen[-1][1], seen[7][1])


CONFIG = """
title = "Tiny"
system = "advection"
seeds = [0, 1]
[data]
train = 4
validation = 2
test = 2
grid = 20
steps = 6
[train]
epochs = 2
batch_size = 2
learning_rate = 1e-5
unroll = [1, 2]
[[models]]
name = "network"
network = {}
[[models]]
name = "norm-preserving"
network = { norm = true, method = "norm-exact-euler" }
train = { noise = 0.01 }
[[models]]
name = "control"
network = { kind = "direct" }
"""


def test_from_a_config_to_a_report(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    config, out = tmp_path / "tiny.toml", tmp_path / "out"
    config.write_text(CONFIG, encoding="utf-8")
    assert cli.main(["bench", str(config), "--out", str(out), "--device", "cpu"]) == 0
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    models = {model["name"]: model for model in summary["models"]}
    assert list(models) == [
        "network", "norm-preserving", "control", "finite-differences", "hand-built", "hand-built-norm"]  # fmt: skip
    assert [model["parameters"] for model in models.values()] == [102, 102, 103, 0, 102, 102]
    assert models["norm-preserving"]["figures"]["norm drift, 40 steps"]["mean"] < 1e-13
    assert {path.name for path in (out / "plots").iterdir()} == {
        "fields.png", "errors.png", "noise.png", "norm.png", "training.png"}  # fmt: skip
    assert "measured on the published weights" in (out / "table.md").read_text(encoding="utf-8")


def test_series_stay_small_whatever_happens() -> None:
    class Explosion(nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            return 1e30 * u

    test = HEAT.data("test", 0, 1, {"grid": 100, "steps": 1})
    measured = HEAT.measure(Explosion(), test)
    assert sum(value.nbytes for value in measured.series.values()) < 300_000
    assert np.isfinite(measured.series["error"]).all()
    with pytest.raises(UserError, match="data: grid"):
        checked(HEAT.options, {"grid": 30}, "data")
