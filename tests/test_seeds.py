"""Reports over seeds: figures worked out by hand, intervals against a known truth, seeds that do not fit."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm, t

from robustflow import cli
from robustflow.errors import UserError
from robustflow.report import build_report
from robustflow.seeds.reading import seed_directories
from robustflow.seeds.statistics import difference_over_seeds, mean_over_seeds, rate_over_seeds
from robustflow.statistics import Rate, paired_difference

ROOT = Path(__file__).resolve().parent.parent
GRID = [0.0, 36 / 255, 0.5]
N = 10


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def plant(out: Path, seed: int, counts: dict[str, tuple[int, int, int]], split: str = "test", **card: Any) -> None:
    """One seed's directory. counts: model → how many of 10 images, the first ones, are right, certified beyond 0.5,
    attacked in vain."""
    folder = out / f"seed-{seed}"
    models = [{"name": name} for name in ("a", "b", "c", "plain")]
    write(folder / "config.json", {"name": "hand", "title": "By hand", "dataset": "digits", "models": models})
    rows = folder / "evaluations" / f"digits-{split}"
    about = {"schema_version": 1, "dataset": "digits", "split": split, "n": N, "epsilons": GRID}
    write(rows / "evaluation.json", about | {"attack_sets": ["standard"]})
    for name, (right, certified, standing) in counts.items():
        lines = ["index,label,prediction,certified_radius,adversarial_norm,attack,norm_standard"]
        for i in range(N):
            radius = 0.6 if i < certified else 0.0
            distance = 0.0 if i >= right else math.inf if i < standing else 0.4
            lines.append(f"{i},1,{int(i < right)},{radius},{distance},{'ddn' if distance == 0.4 else ''},{distance}")
        write(rows / f"{name}.csv", "\n".join(lines) + "\n")
        bound = None if name == "plain" else 0.9 + seed / 100
        seconds = {"certify": 1.0, "attack": 2.0}
        write(rows / f"{name}.json", {"name": name, "lipschitz_bound": bound, "seconds": seconds})
        content = {
            "schema_version": 1, "name": name, "regime": "sharp", "parameters": 1000, "multiply_adds": 2000,
            "config": {"train": {"epochs": 4, "checkpoint_seconds": 60.0 + seed}}, "seed": seed,
            "seconds": {"train": 90.0 + 10 * seed}, "data": {"sha256": "11"}, "sha256": f"{seed}{name}" * 16,
        }  # fmt: skip
        write(folder / "models" / name / "card.json", content | card)
        epochs = [{"epoch": k, "loss": 1.0} for k in range(1, 5 + (name == "b"))]
        write(folder / "models" / name / "train.jsonl", "".join(json.dumps(line) + "\n" for line in epochs))


def by_hand(out: Path) -> Path:
    """a has three seeds, b two, c one; the plain one has no certificate. No weights and no examples anywhere."""
    plant(out, 0, {"a": (8, 6, 7), "b": (8, 3, 8), "c": (9, 2, 5), "plain": (10, 0, 1)})
    plant(out, 1, {"a": (8, 5, 7), "b": (7, 5, 6), "plain": (10, 0, 0)})
    plant(out, 2, {"a": (8, 7, 7), "plain": (10, 0, 2)})
    return out


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    return by_hand(tmp_path / "out")


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    for what in ("robustflow.report.draw", "robustflow.seeds.report.draw_seeds"):
        monkeypatch.setattr(what, lambda given, summary: [])


def summary_of(out: Path) -> dict[str, Any]:
    build_report(out)
    content: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return content


def contents(out: Path) -> dict[str, bytes]:
    plots = [f"plots/{path.name}" for path in (out / "plots").iterdir()]
    made = ["summary.json", "table.md", "table.csv", "report.html", *plots]
    return {name: (out / name).read_bytes() for name in made}


# --- figures


@pytest.mark.usefixtures("no_plots")
def test_figures_are_those_worked_out_by_hand(planted: Path) -> None:
    summary = summary_of(planted)
    assert (summary["kind"], summary["seeds"]) == ("seeds", [0, 1, 2])
    assert summary["command"] == "robustflow bench hand --seeds 0,1,2"
    (evaluation,) = summary["evaluations"]
    a, b, c, plain = evaluation["models"]
    # 0.6, 0.5, 0.7: mean 0.6, standard deviation 0.1, t(0.975, 2) = 4.302653.
    at = a["certified"][2]
    assert (at["epsilon"], at["mean"], at["sd"], at["interval"], at["n"]) == (0.5, 0.6, 0.1, "t", 10)
    assert at["values"] == [0.6, 0.5, 0.7]
    assert (at["low"], at["high"]) == (pytest.approx(0.3515862, abs=1e-6), pytest.approx(0.8484138, abs=1e-6))
    assert (a["attacked"][2]["mean"], a["attacked"][2]["sd"]) == (0.7, 0.0)
    assert (a["clean"]["mean"], a["attacked"][1]["mean"]) == (0.8, 0.8)
    # 0.3, 0.5: mean 0.4, standard deviation √0.02, t(0.975, 1) = 12.7: the interval is cut at 0 and 1.
    at = b["certified"][1]
    assert (at["mean"], at["sd"], at["low"], at["high"]) == (0.4, pytest.approx(math.sqrt(0.02)), 0.0, 1.0)
    # One seed: Wilson's interval of 2 of 10, as in Wilson's own formula.
    at = c["certified"][2]
    assert (at["sd"], at["interval"], at["mean"]) == (None, "wilson", 0.2)
    assert (at["low"], at["high"]) == (pytest.approx(0.0566822, abs=1e-6), pytest.approx(0.5098375, abs=1e-6))
    assert (at["wide_low"], at["wide_high"]) == (at["low"], at["high"])
    assert (plain["certifies"], plain["lipschitz_bound"], a["lipschitz_bound"]) == (False, None, 0.92)
    # (2 · 0.4 + 6 · 0.5 + …)/10: the certified areas up to 0.5 are 0.3, 0.25, 0.35.
    assert a["area"]["certified"]["values"] == [0.3, 0.25, 0.35]
    models = {model["name"]: model for model in summary["models"]}
    assert models["a"]["seconds"]["train"]["mean"] == 100.0
    assert models["a"]["seconds"]["train"]["sd"] == 10.0
    assert (models["b"]["epochs"]["mean"], models["a"]["epochs"]["mean"]) == (5.0, 4.0)
    assert [models[name]["seeds"] for name in ("a", "b", "c")] == [[0, 1, 2], [0, 1], [0]]
    assert (models["a"]["parameters"], models["a"]["multiply_adds"]) == (1000, 2000)
    assert summary["notes"] == ["b: not trained with seed 2", "c: not trained with seeds 1, 2"]
    # a is the best at 36/255 and the first of the config: one group, without the model that certifies nothing.
    (group,) = evaluation["differences"]
    assert (group["against"], group["why"], group["chosen_at"]) == ("a", "best", 36 / 255)
    assert [other["name"] for other in group["others"]] == ["b", "c"]
    at = group["others"][0]["certified"][2]
    assert (at["difference"], at["over"], at["seeds_a"], at["seeds_b"]) == (-0.2, "seeds and images", 2, 3)
    assert group["others"][1]["certified"][2]["over"] == "images"


@pytest.mark.usefixtures("no_plots")
def test_the_first_of_the_config_is_a_reference_too_where_another_is_better(planted: Path) -> None:
    plant(planted, 1, {"b": (9, 9, 9)})
    plant(planted, 0, {"b": (9, 9, 9)})
    (evaluation,) = summary_of(planted)["evaluations"]
    assert [(g["against"], g["why"]) for g in evaluation["differences"]] == [("b", "best"), ("a", "first")]


@pytest.mark.usefixtures("no_plots")
def test_tables_and_page_show_the_summary_s_numbers(planted: Path) -> None:
    build_report(planted)
    table = (planted / "table.md").read_text(encoding="utf-8")
    line = next(line for line in table.splitlines() if line.startswith("| a | sharp | 3 |"))
    # 8 of 10 with every seed: V = 0.16/9, so 9 images and t(0.975, 9) = 2.262 in Wilson's formula.
    assert "| 80.0 ± 0.0 (80.0–80.0; 42.7–95.5) | 0.300 ± 0.050 |" in line
    assert line.endswith("| 0.92 | 1 k | 2 k | 4 | 100 s (90 s to 110 s) | 0 |")
    assert re.search(r"^\| c \| 20\.0\* \(5\.7–51\.0\) \|", table, flags=re.M)
    assert "| plain | – | – |" in table
    assert "one: " not in table
    with (planted / "table.csv").open(newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert (rows["a"]["seeds"], rows["a"]["certified@0.5"], rows["a"]["certified@0.5_sd"]) == ("0 1 2", "0.6", "0.1")
    assert (rows["c"]["clean_sd"], rows["a"]["epochs"], rows["a"]["train_seconds"]) == ("", "4.0", "100.0")
    page = (planted / "report.html").read_text(encoding="utf-8")
    assert '<td class="" data-sort="0.6" title="60.0, 50.0, 70.0 of n = 10">60.0 ± 10.0<small>35.2–84.8</small>' in page
    assert "20.0*<small>5.7–51.0</small></td>" in page
    assert "c: not trained with seeds 1, 2" in page
    assert "No alarms:" in page
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    anchors = set(re.findall(r' id="([^"]+)"', page))
    assert {target[1:] for target in re.findall(r'href="([^"]*)"', page)} <= anchors


@pytest.mark.usefixtures("no_plots")
def test_alarms_are_summed_over_seeds_and_shouted(planted: Path) -> None:
    for seed in (0, 2):
        path = planted / f"seed-{seed}" / "evaluations" / "digits-test" / "a.csv"
        path.write_text(path.read_text().replace("\n3,1,1,0.6,inf,,inf\n", "\n3,1,1,0.6,0.1,ddn,0.1\n"))
    summary = summary_of(planted)
    row = summary["evaluations"][0]["models"][0]
    assert (row["alarm_count"], [(alarm["seed"], alarm["index"]) for alarm in row["alarms"]]) == (2, [(0, 3), (2, 3)])
    page = (planted / "report.html").read_text(encoding="utf-8")
    assert "2 alarms, over all seeds." in page
    assert "No alarms:" not in page


@pytest.mark.usefixtures("no_plots")
def test_validation_and_test_are_both_reported(planted: Path) -> None:
    plant(planted, 0, {"a": (9, 8, 8)}, split="validation")
    plant(planted, 1, {"a": (7, 6, 6)}, split="validation")
    summary = summary_of(planted)
    validation, test = summary["evaluations"]
    assert [(e["split"], e["n"]) for e in (validation, test)] == [("validation", 10), ("test", 10)]
    assert (validation["models"][0]["clean"]["mean"], validation["models"][0]["seeds"]) == (0.8, [0, 1])
    assert "digits-validation: a: not evaluated with seed 2" in summary["notes"]


# --- intervals


def test_the_difference_is_the_one_worked_out_by_hand() -> None:
    a = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=bool)
    b = np.array([[1, 0, 0, 0], [0, 0, 0, 0]], dtype=bool)
    # Accuracies 3/4, 1/2 and 1/4, 0: s²/S = 1/64 each. d = ½, 1, ½, 0: ((1.5 + 1) − 4/6)/36. Residuals: six of 1/8
    # and two of 3/8 in each table, 0.375/3 a mean square, so 1/64 each to take off.
    images = (2.5 - 4 / 6) / 36 - 2 / 64
    variance = 2 / 64 + images
    degrees = variance**2 / (2 / 64**2 + images**2 / 3)
    reach = t.ppf(0.975, degrees) * math.sqrt(variance)
    found = difference_over_seeds(a, b)
    assert found.difference == 0.5
    assert found.low == pytest.approx(0.5 - reach, abs=1e-9)
    assert found.high == 1.0
    assert found.p_value == pytest.approx(2 * t.sf(0.5 / math.sqrt(variance), degrees), rel=1e-5)
    turned = difference_over_seeds(b, a)
    assert (turned.difference, turned.high) == (-0.5, -found.low)


def test_one_seed_is_the_comparison_of_one_benchmark() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random((1, 200)) < 0.7, rng.random((1, 200)) < 0.5
    one, known = difference_over_seeds(a, b), paired_difference(a[0], b[0])
    assert (one.difference, one.low, one.high, one.over) == (known.difference, known.low, known.high, "images")
    rate = rate_over_seeds(a)
    wilson = Rate(int(a.sum()), 200)
    assert (rate.low, rate.high, rate.wide_low, rate.wide_high) == (wilson.low, wilson.high, wilson.low, wilson.high)
    assert (rate.interval, rate.sd) == ("wilson", None)
    assert difference_over_seeds(np.repeat(a, 2, axis=0), b).over == "images"


def test_models_without_any_difference_have_an_interval_all_the_same() -> None:
    nothing = np.zeros((3, 500), dtype=bool)
    found = difference_over_seeds(nothing, nothing)
    assert found.difference == 0
    assert 0 < found.high < 0.01
    assert found.low == -found.high
    assert found.p_value == 1
    rate = rate_over_seeds(nothing)
    assert (rate.wide_low, rate.wide_high) == (0.0, Rate(0, 500).high)
    sure = rate_over_seeds(~nothing)
    assert (sure.wide_low, sure.wide_high) == (Rate(500, 500).low, 1.0)


def test_seeds_that_agree_on_every_image_are_worth_one() -> None:
    a = np.repeat(np.random.default_rng(0).random((1, 400)) < 0.4, 4, axis=0)
    rate, wilson = rate_over_seeds(a), Rate(int(a[0].sum()), 400)
    assert (rate.low, rate.high) == (rate.mean, rate.mean)  # about these images nothing is left to know
    assert rate.wide_low == pytest.approx(wilson.low, abs=5e-4)
    assert rate.wide_high == pytest.approx(wilson.high, abs=5e-4)


def test_answers_of_another_shape_are_refused() -> None:
    good = np.ones((2, 5), dtype=bool)
    for bad in (good[0], good.astype(int), good[:0], good[:, :0]):
        with pytest.raises(UserError, match=r"booleans of shape \(seeds, images\)"):
            rate_over_seeds(bad)
    with pytest.raises(UserError, match="same images"):
        difference_over_seeds(good, good[:, 1:])
    with pytest.raises(UserError, match="at least one seed"):
        mean_over_seeds([])
    assert mean_over_seeds([2.0]).interval == "none"


@pytest.mark.parametrize(
    ("seeds", "spread"), [((3, 3), (0.0, 0.0)), ((3, 3), (0.15, 0.15)), ((5, 3), (0.3, 0.1)), ((2, 2), (0.1, 0.1))]
)
def test_intervals_hold_the_truth_in_simulated_trainings(seeds: tuple[int, int], spread: tuple[float, float]) -> None:
    """Right where image + training + noise > 0, all normal: the accuracy over all of both is known exactly."""
    rng, n, runs, middles = np.random.default_rng(11), 300, 700, (0.2, -0.3)
    truth = [norm.cdf(m / math.sqrt(2.0**2 + 0.7**2 + s**2 + 1)) for m, s in zip(middles, spread, strict=True)]
    held = {"difference": 0, "rate": 0, "one seed": 0}
    for _ in range(runs):
        shared = 2.0 * rng.standard_normal(n)
        a, b = (
            m + shared + 0.7 * rng.standard_normal(n) + s * rng.standard_normal((k, 1)) > rng.standard_normal((k, n))
            for m, s, k in zip(middles, spread, seeds, strict=True)
        )
        found, rate, one = difference_over_seeds(a, b), rate_over_seeds(a), paired_difference(a[0], b[0])
        held["difference"] += found.low <= truth[0] - truth[1] <= found.high
        held["one seed"] += one.low <= truth[0] - truth[1] <= one.high
        held["rate"] += rate.wide_low <= truth[0] <= rate.wide_high
    share = {name: count / runs for name, count in held.items()}
    # Three standard errors of a coverage of 95 % in 700 runs are 2.5 points.
    assert 0.915 <= share["difference"] <= 0.985, share
    assert 0.905 <= share["rate"] <= 0.985, share
    if max(spread) >= 0.15:
        assert share["one seed"] < 0.88, "the simulation would notice an interval that forgets the seeds"


def test_the_interval_over_seeds_holds_the_mean_of_all_trainings_on_these_images() -> None:
    rng, held, runs = np.random.default_rng(5), 0, 1500
    for _ in range(runs):
        found = mean_over_seeds(list(rng.normal(0.6, 0.02, 3)), top=1.0)
        held += found.low <= 0.6 <= found.high
    assert 0.93 <= held / runs <= 0.97


# --- directories


Harm = Callable[[Path], None]


def edit(path: str, change: Callable[[dict[str, Any]], Any]) -> Harm:
    def harm(out: Path) -> None:
        content = json.loads((out / path).read_text())
        change(content)
        (out / path).write_text(json.dumps(content))

    return harm


def shift_images(out: Path) -> None:
    for path in (out / "seed-1" / "evaluations" / "digits-test").glob("*.csv"):
        path.write_text(path.read_text().replace("\n9,", "\n77,"))


CARD, ROWS = "seed-1/models/a/card.json", "seed-1/evaluations/digits-test/evaluation.json"
CONTRADICTIONS: dict[str, tuple[Harm, str]] = {
    "config": (edit(CARD, lambda c: c["config"]["train"].update(epochs=5)), r"config\.train\.epochs is 5, but 4 in"),
    "regime": (edit(CARD, lambda c: c.update(regime="naive")), r"regime is 'naive', but 'sharp'"),
    "data": (edit(CARD, lambda c: c.update(data={"sha256": "22"})), r"data\.sha256 is '22', but '11'"),
    "parameters": (edit(CARD, lambda c: c.update(parameters=7)), r"parameters is 7, but 1000"),
    "seed": (edit(CARD, lambda c: c.update(seed=0)), r"seed: this model was trained with seed 0"),
    "weights": (edit(CARD, lambda c: c.update(sha256="0a" * 16)), r"sha256: the same weights"),
    "dataset": (edit("seed-1/config.json", lambda c: c.update(dataset="far")), r"dataset is 'far', but 'digits'"),
    "epsilons": (edit(ROWS, lambda c: c.update(epsilons=[0.0, 0.5])), r"epsilons is \[0\.0, 0\.5\], but \[0\.0, 0\.14"),
    "images": (shift_images, r"seed-1/.* and .*seed-0/.* are about different images: column index"),
    "rows": (lambda out: (out / "seed-1/evaluations/digits-test/a.csv").unlink(), r"a\.csv: missing"),
    "garbled": (lambda out: write(out / CARD, "{"), r"card\.json: not valid JSON"),
    "own": (lambda out: write(out / "config.json", {}), r"holds a benchmark of its own \(config\.json\) and others"),
}


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_seeds_that_contradict_each_other_are_one_line(
    what: str, planted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm, line = CONTRADICTIONS[what]
    build_report(planted)
    before = contents(planted)
    harm(planted)
    assert cli.main(["report", str(planted)]) == 2
    told = capsys.readouterr().err
    assert re.search(line, told), told
    assert told.count("\n") == 1
    assert contents(planted) == before


@pytest.mark.usefixtures("no_plots")
def test_what_decides_nothing_may_differ_and_later_options_may_be_missing(planted: Path) -> None:
    edit(CARD, lambda card: card["config"].update(new_option=True))(planted)  # checkpoint_seconds differ anyway
    assert summary_of(planted)["models"][0]["seeds"] == [0, 1, 2]


def test_which_directories_are_seeds(planted: Path, hand_benchmark: Path) -> None:
    for name in ("seed-x", "seed-01", "seed-7", "seed--1", "other"):
        (planted / name).mkdir()
    shutil.copy(planted / "seed-0" / "config.json", planted / "seed-01" / "config.json")
    (planted / "seed-10").mkdir()
    shutil.copy(planted / "seed-0" / "config.json", planted / "seed-10" / "config.json")
    assert list(seed_directories(planted)) == [0, 1, 2, 10]
    assert seed_directories(hand_benchmark) == {}
    assert seed_directories(planted / "nowhere") == {}


def test_nothing_evaluated_is_one_line(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in planted.glob("seed-*"):
        shutil.rmtree(folder / "evaluations")
    assert cli.main(["report", str(planted)]) == 2
    assert "no model of any seed was evaluated; run `robustflow certify`" in capsys.readouterr().err


@pytest.mark.usefixtures("no_plots")
def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert(1)<b>&'\"|"  # no /, which no model may have
    for seed in (0, 1):
        plant(tmp_path, seed, {"a": (8, 6, 7), hostile: (8, 5, 7)}, description=hostile, regime=hostile)
        models = [{"name": "a"}, {"name": hostile}]
        write(tmp_path / f"seed-{seed}" / "config.json", {"name": hostile, "title": hostile, "models": models})
    page = build_report(tmp_path).read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "<b>" not in page
    assert page.count("<script>") == 1
    assert hostile not in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_rebuilding_gives_the_same_bytes_and_takes_no_weights(planted: Path, tmp_path: Path) -> None:
    assert not list(planted.rglob("*.safetensors"))
    assert build_report(planted) == planted / "report.html"
    kinds = {path.name for path in (planted / "plots").iterdir()}
    assert kinds == {f"{kind}-digits-test.png" for kind in ("certified", "curves", "differences")}
    (planted / "plots" / "curves-gone-test.png").write_bytes(b"of an evaluation that is gone")
    (planted / "plots" / "mine.png").write_bytes(b"the user's own")
    copy = tmp_path / "elsewhere"
    shutil.copytree(planted, copy)
    for name in ("summary.json", "table.md", "table.csv", "report.html"):
        (copy / name).unlink()
    # Another process with another hash seed: no set's order may reach a file.
    code = "import sys; from robustflow.report import build_report; build_report(sys.argv[1])"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code, str(copy)], check=True, env=environment)
    assert not (copy / "plots" / "curves-gone-test.png").exists()
    (planted / "plots" / "curves-gone-test.png").unlink()
    assert contents(copy) == contents(planted)


# --- the command line


CONFIG = """
title = "Tiny"
dataset = "digits"
network = { channels = [4], layers = 2, kernel = "patch", lift = "patch" }
train = { epochs = 1, batch_size = 200, crop = 0, flip = false }
evaluate = { splits = ["validation", "test"], images = 6, epsilons = [0, 0.2], attacks = ["deepfool"] }
models = [{ name = "one", regime = "sharp" }, { name = "two", regime = "nonexpansive" }]
"""


def run(*arguments: Any) -> int:
    return cli.main([str(argument) for argument in arguments])


def snapshot(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    (folder / "tiny.toml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        for what in ("robustflow.report.draw", "robustflow.seeds.report.draw_seeds"):
            patch.setattr(what, lambda given, summary: [])
        assert run("bench", folder / "tiny.toml", "--seeds", "0,1", "--out", folder / "out", "--device", "cpu") == 0
    return folder


@pytest.mark.usefixtures("no_plots")
def test_bench_does_every_stage_with_every_seed(benched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = benched / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert [e["split"] for e in summary["evaluations"]] == ["validation", "test"]
    assert [model["seeds"] for e in summary["evaluations"] for model in e["models"]] == [[0, 1]] * 4
    for evaluation in summary["evaluations"]:
        for place, model in enumerate(evaluation["models"]):
            alone = []
            for seed in (0, 1):
                single = json.loads((out / f"seed-{seed}" / "summary.json").read_text())
                (same,) = [e for e in single["evaluations"] if e["split"] == evaluation["split"]]
                alone.append(same["models"][place]["clean"]["value"])
            assert model["clean"]["values"] == alone
    assert not (out / "config.json").exists()
    before = snapshot(out)
    assert run("bench", benched / "tiny.toml", "--seeds", "0,1", "--out", out, "--device", "cpu") == 0
    assert snapshot(out) == before
    assert "# Tiny: seeds 0, 1" in capsys.readouterr().out


@pytest.mark.usefixtures("no_plots")
def test_certify_and_attack_do_every_seed_that_is_there(
    benched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(benched / "out")
    out = Path(shutil.copytree(benched / "out", tmp_path / "out"))
    for path in out.glob("seed-*/evaluations"):
        shutil.rmtree(path)
    shutil.rmtree(out / "seed-1" / "models" / "two")
    assert run("certify", out, "--explain") == 0
    told = capsys.readouterr().out
    assert told.count("seed 0: ") == 4
    assert told.count("seed 1: ") == 2
    assert "seed-1: two is not trained, so it is left out" in told
    assert run("attack", out, "--device", "cpu") == 0
    again = snapshot(out)
    rows = [name for name in before if re.fullmatch(r"seed-\d/evaluations/.*\.csv", name)]
    assert len(rows) == 8
    assert {name: again[name] for name in rows if name in again} == {
        name: before[name] for name in rows if not re.search("seed-1.*two", name)
    }
    assert run("report", out) == 0
    assert json.loads((out / "summary.json").read_text())["notes"] == ["two: not trained with seed 1"]
    shutil.rmtree(out / "seed-0" / "models")
    assert run("attack", out, "--model", "two", "--device", "cpu") == 2
    assert "nothing is trained in" in capsys.readouterr().err


def test_seeds_and_a_benchmark_do_not_share_a_directory(
    benched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(benched / "out")
    for command in ("bench", "train"):
        assert run(command, benched / "tiny.toml", "--out", benched / "out") == 2
        assert "holds seed-0, seed-1: choose another --out, or give --seeds" in capsys.readouterr().err
        (tmp_path / "config.json").write_text("{}")
        assert run(command, benched / "tiny.toml", "--seeds", "0", "--out", tmp_path) == 2
        assert "holds a benchmark of its own: choose another --out" in capsys.readouterr().err
    assert snapshot(benched / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="no README beside the tests (not a checkout)")
def test_the_readme_s_commands_for_seeds_parse() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("robustflow ") and "--seeds" in line]
    commands = {shlex.split(line, comments=True)[1] for line in lines}
    assert commands == {"train", "bench"}
    for line in lines:
        assert cli._parser().parse_args(shlex.split(line, comments=True)[1:]).seeds == (0, 1, 2)
