"""`robustflow measure`: small versions of every part, and that what they count is what they say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from robustflow import cli
from robustflow.bounds import account
from robustflow.errors import UserError
from robustflow.measurements import FAMILIES, campaign, digits, kernels, networks, tables
from robustflow.measurements.family import Family, Part, Request, measure
from robustflow.networks import RESNET, create_model
from robustflow.regimes import REGIMES

CAMPAIGN = {"CONSTELLATIONS": 4, "CHUNK": 4 * 28, "RANDOM_CHUNKS": {2: 2}, "DEPTHS": (2,), "SEARCHED": 3}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part in a second or two."""
    for module, settings in (
        (
            kernels,
            {
                "GAUSSIAN": ((2, 4, 2), (4, 12, 1)),
                "LARGE": 12,
                "CHANNELS": (2,),
                "SIZES": (4,),
                "REPEATS": 1,
                "DENSE": 300,
            },
        ),
        (digits, {"STEPS": 2, "CHANNELS": (2, 4)}),
        (networks, {"IMAGES": 8, "BATCH": 4, "SHORT": 4, "LONG": 8, "PATCHES": {"kernel": "patch", "lift": "patch"}}),
        (campaign, CAMPAIGN | {"LAYER_SEARCHED": 2, "ITERATIONS": 2}),
    ):
        for name, value in settings.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(networks, "create_model", lambda regime, **options: tiny(regime))
    digits.trained.cache_clear()


def tiny(regime: str):  # type: ignore[no-untyped-def]
    return create_model(regime, input_shape=(1, 8, 8), channels=(4,), layers=2, kernel="patch", lift="patch")


def run(*arguments: object) -> int:
    return cli.main(["measure", "certificates", *(str(argument) for argument in arguments)])


def test_all_parts(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "certificates"
    assert run("--out", out) == 0
    printed = capsys.readouterr().out
    table = (out / "table.md").read_text()
    assert printed.strip() == table.strip()
    for name, part in FAMILIES["certificates"].parts.items():
        if part.needs_benchmark:  # left out, no --bench was given: tests/test_measure_views.py
            assert name not in table
            assert not (out / f"{name}.json").exists()
            continue
        record = json.loads((out / f"{name}.json").read_text())
        assert record["part"] == name
        assert record["environment"]["versions"]["torch"]
        assert (out / "plots" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"plots/{name}.png" in table
    assert not (out / "campaign.partial.json").exists()
    check_tightness(json.loads((out / "tightness.json").read_text()))
    check_campaign(json.loads((out / "campaign.json").read_text()))
    # What is there is not measured again, unless it is asked for.
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert run("--out", out) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert run("--out", out, "--only", "cost,gains") == 0
    changed = {path.stem for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"cost", "gains"}


def check_tightness(record: dict) -> None:
    assert record["second_difference_on_three_pixels"]["FFT at the image size"] < 0.9
    for row in record["rows"]:
        assert row["refuted"] == []
        for method, ratio in row["ratio"].items():
            assert ratio >= 1 - 1e-9 or not record["is_bound"][method], (row["kernel"], method)
        assert row["ratio"]["power iteration, 100"] <= 1 + 1e-9
    assert {row["norm_by"] for row in record["rows"]} == {"dense SVD", "Lanczos"}


def check_campaign(record: dict) -> None:
    regimes, total = record["regimes"], record["total"]
    assert set(regimes) == {*REGIMES, RESNET}
    assert total["networks"] == len(record["rows"]) == 2 * (len(REGIMES) - 1) + 2
    assert total["random_pairs"] == total["networks"] * 2 * 4 * 28
    assert total["violations"] == 0
    assert all(0 < row[kind] <= 1 + 1e-9 for row in record["rows"] for kind in ("random", "searched", "layer"))


def test_unknown_parts_and_places_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--out", tmp_path, "--only", "cost,speed") == 2
    assert "unknown part 'speed'" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run("--out", tmp_path / "file" / "x") == 2
    assert "cannot be made" in capsys.readouterr().err


def test_a_false_claim_is_counted() -> None:
    case = {"regime": "sharp", "kernel": "patch", "channels": [2, 4], "layers": 2}
    features = campaign.float64_features(campaign.build(case, 0))
    true = campaign.lipschitz_of(features, campaign.SHAPE)

    def attempt(claimed: float) -> tuple[float, int]:
        return campaign._random_pairs(features, claimed, torch.Generator().manual_seed(0), wide=True)

    ratio, violations = attempt(true)
    assert 0 < ratio < 1
    assert violations == 0
    assert attempt(0.9 * ratio * true)[1] > 0
    # A claim refuted by less than rounding is none: the pair itself is its own bound.
    assert attempt(ratio * true * (1 - 1e-14))[1] == 0


def test_an_interrupted_campaign_goes_on(small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    network = {"kernel": "patch", "channels": [2, 4], "layers": 2}
    monkeypatch.setattr(campaign, "cases", lambda: ({"regime": r} | network for r in ("naive", "sharp", "flexible")))
    whole = campaign.campaign(tmp_path / "a.json")
    right, calls = campaign._attempt, []

    def fails_once(model, seed, chunks):  # type: ignore[no-untyped-def]
        calls.append(seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(model, seed, chunks)

    monkeypatch.setattr(campaign, "_attempt", fails_once)
    with pytest.raises(KeyboardInterrupt):
        campaign.campaign(tmp_path / "b.json")
    assert campaign.campaign(tmp_path / "b.json") == whole
    assert calls == [0, 1, 1, 2]


def test_methods_on_known_kernels() -> None:
    """A box of ones on a large image: norm 9 in the limit; these bounds find it."""
    box = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    for name in ("any size, grid 64 (ours)", "AOL row sums", "k · Frobenius"):
        assert kernels.METHODS[name][0](box, 16) == pytest.approx(9, rel=0.01), name
    assert kernels.reshapes(box, 16) == pytest.approx(9)
    size = 6
    truth = kernels.dense_norm(box, size)
    line = 1 + 2 * math.cos(math.pi / (size + 1))  # the eigenvalue of a tridiagonal matrix of ones
    assert truth == pytest.approx(line**2)
    assert kernels.lanczos_norm(box, size) == pytest.approx(truth)


def test_published_constant_of_a_prescribed_network_is_one() -> None:
    torch.manual_seed(0)
    model = create_model("prescribed", input_shape=(1, 8, 8), channels=(4, 8), layers=4, kernel="patch", lift="patch")
    ours = account(float64(model), (1, 8, 8)).lipschitz
    assert ours == pytest.approx((0.75 / math.sqrt(0.75)) ** 4, rel=1e-4)
    assert ours * networks._published_ratio(model) == pytest.approx(1, rel=1e-4)


def float64(model):  # type: ignore[no-untyped-def]
    return networks.float64_features(model)


def test_the_page_says_what_a_number_is_worth() -> None:
    row = {"images": 10, "extrapolated": False, "forward_cpu_seconds": 1.0, "certify_cpu_seconds": 1.0}
    shares = [row | {"network": f"n{share}", "share_on_top": share} for share in (-0.002, 0.004, 0.0737)]
    text = tables.share({"goal": 0.1, "rows": shares})
    assert "falsifier, is not" in text
    assert [line.split(" | ")[-1] for line in text.splitlines()[-3:]] == ["< 1 % |", "< 1 % |", "7.4 % |"]
    one = {
        "images": 1, "lipschitz": 1.0, "lipschitz_by_published_constant": 1.0, "median_gain_of_exact_constant": 1.0,
        "median_gain_of_pairwise_head": 1.0,
    }  # fmt: skip
    names = ["digits: sharp", "digits: prescribed (accuracy 0.8)", "cifar10: naive", "cifar10: prescribed"]
    text = tables.gains({"rows": [one | {"model": name} for name in names]})
    assert [line.split(" | ")[0] for line in text.splitlines()[-4:]] == [f"| {names[i]}" for i in (1, 3, 0, 2)]
    assert "no one would train under" in text


def test_share_subtracts_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    row = networks._share_row("x", 10, False, 2.0, 2.5)
    assert row["share_on_top"] == pytest.approx(0.25)
    times = {networks.SHORT: (1.0, 2.0), networks.LONG: (5.0, 6.0), networks.IMAGES: (10.0, 10.5)}
    monkeypatch.setattr(networks, "_timed", lambda model, count: times[count])
    monkeypatch.setattr(networks, "create_model", lambda *arguments, **options: Tensor())
    first, second = networks.share(None, None)["rows"]
    assert first["share_on_top"] == pytest.approx(0.05)
    assert second["extrapolated"]
    growth = (networks.IMAGES - networks.SHORT) / (networks.LONG - networks.SHORT)
    assert second["certify_cpu_seconds"] - second["forward_cpu_seconds"] == pytest.approx(1.0)
    assert second["forward_cpu_seconds"] == pytest.approx(1 + 4 * growth)


def test_parts_that_were_measured_have_a_page_when_another_fails(tmp_path: Path) -> None:
    def fail(request: Request) -> dict[str, object]:
        raise UserError("no such data")

    def part(title: str, measure: Callable[[Request], dict[str, object]]) -> Part:
        return Part(title, measure, lambda record: f"{title}: {record['figure']}", {})

    family = Family("two", "Two parts", {"one": part("One", lambda request: {"figure": 7}), "two": part("Two", fail)})
    with pytest.raises(UserError, match="no such data"):
        measure(family, Request(tmp_path))
    assert "One: 7" in (tmp_path / "table.md").read_text()
    family = Family("two", "Two parts", {"one": part("One", fail), "two": part("Two", lambda request: {"figure": 8})})
    table = measure(family, Request(tmp_path)).read_text()  # the first is there and not repeated
    assert "One: 7" in table
    assert "Two: 8" in table
