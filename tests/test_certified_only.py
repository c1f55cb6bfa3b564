"""A split that is certified and not attacked: what runs, what is counted, and no claim of what was not measured."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robustflow import bench, cli, compare, compare_files, data, evaluation, model_cards
from robustflow import config as configs
from robustflow.curves import draw_curves, draw_overview
from robustflow.errors import UserError
from robustflow.evaluate_config import EvaluateConfig
from robustflow.measurements import targets
from robustflow.measurements.family import Request
from robustflow.plots import draw, draw_areas
from robustflow.report import build_report
from robustflow.results import read_benchmark
from robustflow.seeds.plots import draw_seeds
from robustflow.seeds.reading import read_seeds, seed_directories
from robustflow.seeds.summary import summarize_seeds
from robustflow.summary import summarize
from robustflow.tables import NOT_ATTACKED

CONFIG = """
title = "Tiny"
dataset = "digits"
network = { channels = [4], layers = 2, kernel = "patch", lift = "patch" }
train = { epochs = 1, batch_size = 200, crop = 0, flip = false }
models = [{ name = "one", regime = "sharp" }, { name = "two", regime = "naive" }]
[evaluate]
splits = ["validation", "test"]
attacked = ["test"]
images = 12
epsilons = [0, 0.2]
attacks = ["deepfool"]
"""
HAND = """index,label,prediction,certified_radius
0,0,0,1.2
1,1,1,0.5
2,0,0,0.6
3,1,1,0.1
4,0,0,0.0
5,0,1,0.9
6,1,1,0.7
7,1,0,0.0
"""
EVERYTHING = CONFIG.replace('attacked = ["test"]\n', "")

RESULTS = Path(__file__).resolve().parent.parent / "results" / "cifar10"


def run(*arguments: Any) -> int:
    return cli.main([str(argument) for argument in arguments])


def snapshot(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


# --- the config


def options(**changes: Any) -> EvaluateConfig:
    return EvaluateConfig.model_validate({"epsilons": [0.5], "splits": ["validation", "test"]} | changes)


def test_what_is_attacked_is_among_the_splits() -> None:
    assert options().attacked is None
    assert options().attacked_splits == ("validation", "test")
    assert options(attacked=["test"]).attacked_splits == ("test",)
    assert options(attacked=["test", "validation"]).attacked_splits == ("validation", "test")
    assert options(attacked=[]).attacked_splits == ()
    kept = options(attacked=["test"])
    assert EvaluateConfig.model_validate_json(kept.model_dump_json()) == kept
    older = options().model_dump(mode="json", exclude={"attacked"})  # as config.json was before this option
    assert EvaluateConfig.model_validate_json(json.dumps(older)) == options()


def test_a_number_of_images_for_each_split(tmp_path: Path) -> None:
    images = data.load("digits")
    for asked, expected in (
        ({"test": 3}, {"validation": len(images.splits["validation"]), "test": 3}),
        ({"test": 3, "validation": 2}, {"validation": 2, "test": 3}),
        (4, {"validation": 4, "test": 4}),
    ):
        kept = EvaluateConfig.model_validate_json(options(images=asked).model_dump_json())
        found = {name: len(evaluation.open_evaluation(tmp_path, images, name, kept)[0]) for name in kept.splits}
        noted = {name: read_json(tmp_path / f"evaluations/digits-{name}/evaluation.json")["n"] for name in kept.splits}
        assert found == noted == expected


def test_attacking_what_is_no_split_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for splits, attacked in (("['test']", "['validation']"), ("[]", "['test']"), ("['test']", "['train']")):
        path.write_text(re.sub(r'splits.*\n.*"\]', f"splits = {splits}\nattacked = {attacked}", CONFIG))
        with pytest.raises(UserError, match=r"mine\.toml: evaluate\.attacked.*\(got .*\)$") as found:
            configs.read(path)
        assert "\n" not in str(found.value)
    path.write_text(CONFIG.replace('splits = ["validation", "test"]', 'splits = ["validation"]'))
    with pytest.raises(UserError, match="attacked: only what is in splits, validation, can be attacked"):
        configs.read(path)


@pytest.mark.parametrize("name", ["cifar10/cpu-15min", "cifar10/cpu-2h"])
def test_shipped_configs_certify_validation_and_attack_test(name: str) -> None:
    evaluate = configs.read(name).evaluate
    assert (evaluate.splits, evaluate.attacked_splits) == (("validation", "test"), ("test",))


# --- the stages


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certified")
    (folder / "tiny.toml").write_text(CONFIG)
    assert run("bench", folder / "tiny.toml", "--out", folder / "out", "--device", "cpu") == 0
    return folder


def header(out: Path, split: str) -> list[str]:
    return (out / "evaluations" / f"digits-{split}" / "one.csv").read_text().splitlines()[0].split(",")


def test_bench_attacks_only_what_the_config_says(benched: Path) -> None:
    out = benched / "out"
    validation, test = (out / "evaluations" / f"digits-{split}" for split in ("validation", "test"))
    assert header(out, "validation") == ["index", "label", "prediction", "certified_radius"]
    assert header(out, "test")[-1] == "norm_deepfool"
    assert read_json(validation / "evaluation.json")["attack_sets"] == []
    assert read_json(test / "evaluation.json")["attack_sets"] == ["deepfool"]
    assert "attack" not in read_json(validation / "one.json")["seconds"]
    assert not list(validation.glob("*.examples.*"))
    before = snapshot(out)
    assert run("attack", out, "--device", "cpu") == 0
    assert run("bench", benched / "tiny.toml", "--out", out, "--device", "cpu") == 0
    assert snapshot(out) == before


def test_what_waits_for_its_certificate_or_its_attack_is_unfinished(benched: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(benched / "out", tmp_path / "out"))
    experiment, _ = bench.read_directory(out)
    assert bench.unfinished(experiment, out) == []
    (out / "evaluations" / "digits-validation" / "one.json").unlink()
    assert bench.unfinished(experiment, out) == ["one"]
    record = out / "evaluations" / "digits-test" / "two.json"
    record.write_text(json.dumps({k: v for k, v in read_json(record).items() if k != "attack_identity"}))
    assert bench.unfinished(experiment, out) == ["one", "two"]
    assert run("certify", out) == 0
    assert bench.unfinished(experiment, out) == ["two"]
    whole = configs.from_dict({**experiment.model_dump(), "evaluate": options(attacked=None).model_dump()})
    assert bench.unfinished(whole, out) == ["one", "two"]


@pytest.mark.skipif(not RESULTS.is_dir(), reason="no committed results beside the tests (not a checkout)")
def test_what_was_attacked_before_this_option_stays_valid() -> None:
    experiment, _ = bench.read_directory(RESULTS)
    newer = experiment.evaluate.model_copy(update={"splits": ("validation", "test"), "attacked": ("test",)})
    for config in experiment.models:
        record = read_json(RESULTS / "evaluations" / "cifar10-test" / f"{config.name}.json")
        for evaluate in (experiment.evaluate, newer):
            identities = [evaluation.attack_identity(record, evaluate, experiment.seed, on) for on in ("cpu", "cuda")]
            assert record["attack_identity"] in identities, config.name


def test_measurements_of_attacks_take_the_split_that_is_attacked(benched: Path, tmp_path: Path) -> None:
    experiment, _ = bench.read_directory(benched / "out")
    request = Request(tmp_path, benched / "out", None)
    assert targets.origin(request, experiment)["split"] == "test"
    _, found = targets.read(request, "sets")
    assert [list(target.norms) for target in found] == [["deepfool"]] * 2
    nothing = experiment.model_copy(update={"evaluate": options(attacked=[])})
    with pytest.raises(UserError, match="attacks nothing: add a split to `attacked`"):
        targets.origin(request, nothing)


def test_an_earlier_attack_is_no_part_of_a_split_that_is_certified_only(benched: Path, tmp_path: Path) -> None:
    out, toml = Path(shutil.copytree(benched / "out", tmp_path / "out")), tmp_path / "tiny.toml"
    toml.write_text(EVERYTHING)
    assert run("bench", toml, "--out", out, "--device", "cpu") == 0
    assert header(out, "validation")[-1] == "norm_deepfool"
    assert "alarms" in read_json(out / "evaluations" / "digits-validation" / "one.json")
    attacked = read_json(out / "summary.json")
    assert attacked["evaluations"][0]["models"][0]["attacked"][1]["n"] == 12
    toml.write_text(CONFIG)
    assert run("bench", toml, "--out", out, "--device", "cpu") == 0
    # Times of the attack apart, what is shown is what a directory shows that was never attacked there.
    shown, expected = (read_json(folder / "summary.json")["evaluations"][0] for folder in (out, benched / "out"))
    for content in (shown, expected):
        for row in content["models"]:
            row.pop("seconds"), row.pop("environment")
    assert shown == expected
    assert not (out / "plots" / "examples-digits-validation.png").exists()


def test_summary_page_card_and_comparison_leave_attacks_out(
    benched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = benched / "out"
    validation, test = read_json(out / "summary.json")["evaluations"]
    assert [e["split"] for e in (validation, test)] == ["validation", "test"]
    check_nulls(validation)
    assert test["models"][0]["attacked"][1]["n"] == 12
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "certified ≤ attacked on every image of digits, test." in page
    check_page(section(page, 0))
    described = model_cards.describe(out / "models" / "one")
    kinds = {(row["split"], row["quantity"]) for row in described["figures"]}
    assert kinds == {("validation", "clean"), ("validation", "certified")} | {
        ("test", quantity) for quantity in ("clean", "certified", "attacked")
    }
    notes = [limit for limit in described["limits"] if "Not attacked" in limit]
    assert notes == ["Not attacked on digits, validation: there attacked accuracy was not measured."]
    assert notes[0] in model_cards.to_markdown(described)
    sides = [compare.read(out / "models" / name, "validation") for name in ("one", "two")]
    found = compare.compare(*sides)
    assert set(found.table["quantity"]) == {"clean", "certified"}
    assert found.notes == [f"attacked accuracy left out: no attacks in {sides[0].path} and {sides[1].path}"]
    compare_files.save(found, tmp_path / "cmp")
    assert read_json(tmp_path / "cmp" / "compare.json")["a"]["attack_sets"] == []
    monkeypatch.chdir(tmp_path)
    assert run("compare", out / "models" / "one", out / "models" / "two", "--split", "test") == 0
    assert "attacked" in capsys.readouterr().out


def check_nulls(figures: dict[str, Any]) -> None:
    assert figures["attack_sets"] == []
    for row in figures["models"]:
        nothing = ("attacked", "undecided", "broken", "broken_by", "alarm_count")
        assert [row[key] for key in nothing if key in row] == [None] * len([key for key in nothing if key in row])
        assert row["attacked"] is None
        assert row["area"]["attacked"] is None
        assert row["alarms"] == []
    for other in (figures.get("paired") or {"others": []})["others"]:
        assert (other["attacked"], other["clean"]["n"]) == (None, figures["n"])


def section(page: str, number: int) -> str:
    return re.split(r'<section id="', page)[2 + number]


def check_page(part: str) -> None:
    text = re.sub(r"<[^>]*>", " ", part)
    assert text.count(NOT_ATTACKED) == 1
    rest = text.replace(NOT_ATTACKED, "")
    assert not re.search("attack|alarm|broken|undecided|norm", rest, flags=re.I), rest
    assert "certified" in rest


# --- the reports, by hand


@pytest.fixture
def hand(hand_benchmark: Path) -> Path:
    """The hand-counted benchmark, with a split that has its radii alone."""
    folder = hand_benchmark / "evaluations" / "digits-validation"
    card = {"schema_version": 1, "dataset": "digits", "split": "validation", "n": 8, "epsilons": [0.0, 0.5, 1.0]}
    write_json(folder / "evaluation.json", card | {"attack_sets": [], "class_names": ["no", "yes"]})
    for name in ("hand", "plain"):
        rows = HAND if name == "hand" else re.sub(r"[\d.]+$", "0.0", HAND, flags=re.M)
        (folder / f"{name}.csv").write_text(rows)
        record = read_json(hand_benchmark / "evaluations" / "digits-test" / f"{name}.json")
        write_json(folder / f"{name}.json", record | {"seconds": {"certify": 1.5}, "forward_passes": {}})
    return hand_benchmark


def test_figures_by_hand(hand: Path) -> None:
    summary = summarize(read_benchmark(hand))
    assert [e["folder"] for e in summary["evaluations"]] == ["digits-validation", "digits-test", "far-test"]
    figures = summary["evaluations"][0]
    check_nulls(figures)
    row, plain = figures["models"]
    assert (row["clean"]["k"], [point["k"] for point in row["certified"]]) == (6, [5, 3, 1])
    assert row["area"] == {"certified": pytest.approx(2.9 / 8), "attacked": None, "attacked_by_set": {}}
    assert [point["k"] for point in plain["certified"]] == [0, 0, 0]
    assert row["seconds"]["attack"] is None
    # The two splits that were attacked, 60.25 s each.
    assert summary["models"][0]["seconds"] == {"train": 754.25, "certify": 4.5, "attack": 120.5}
    assert not any("validation" in note for note in summary["notes"])


def test_tables_and_page_by_hand(hand: Path) -> None:
    build_report(hand)
    table = (hand / "table.md").read_text(encoding="utf-8")
    part = table.split("\n## ")[1]
    assert part.startswith("digits, validation: n = 8 images")
    assert "| model | regime | clean | area certified | bound L | parameters | multiply-adds | training |\n" in part
    assert "| hand | unconstrained | 75.0 (40.9–92.9) | 0.362 | 0.98 |" in part
    assert part.count("ttack") == NOT_ATTACKED.count("ttack") == 2
    assert "Attacked: still correct" in table
    with (hand / "table.csv").open(newline="") as file:
        first, *_, last = csv.DictReader(file)
    assert {first[key] for key in first if "attacked" in key or key == "alarms"} == {""}
    assert (first["split"], first["certified@0.5"], last["alarms"]) == ("validation", "0.375", "0")
    page = (hand / "report.html").read_text(encoding="utf-8")
    assert "certified ≤ attacked on every image of digits, test, far, test." in page
    check_page(section(page, 0))
    method = page.split('<section id="method">')[1].split("</section>")[0]
    assert f"1. {NOT_ATTACKED} Every figure" in method
    files = {path.name for path in (hand / "plots").iterdir() if "validation" in path.name}
    assert files == {f"{kind}-digits-validation.png" for kind in ("overview", "curves", "area", "radii")}


def test_nothing_attacked_at_all_is_no_praise(hand: Path) -> None:
    for split in ("digits-test", "far-test"):
        shutil.rmtree(hand / "evaluations" / split)
    build_report(hand)
    page = (hand / "report.html").read_text(encoding="utf-8")
    assert "No alarms" not in page
    assert "not attacked</dd>" in page
    assert read_json(hand / "summary.json")["models"][0]["seconds"]["attack"] is None


def test_no_empty_panels(hand: Path) -> None:
    benchmark = read_benchmark(hand)
    summary = summarize(benchmark)
    evaluation, figures, places = benchmark.evaluations[0], summary["evaluations"][0], {"hand": 0, "plain": 1}
    overview = draw_overview(evaluation, figures, places, "")
    assert overview is not None
    (ax,) = overview.axes
    assert [line.get_label() for line in ax.lines] == ["hand"]
    curves = draw_curves(evaluation, figures, places, "")
    assert curves is not None
    assert [ax.get_title() for ax in curves.axes] == ["hand"]
    areas = draw_areas(figures, places, "")
    assert areas is not None
    assert [bar.get_width() for bar in areas.axes[0].patches] == [pytest.approx(2.9 / 8)]
    # Without any certificate there is nothing to draw but that there is none.
    rows = hand / "evaluations" / "digits-validation"
    shutil.copy(rows / "plain.csv", rows / "hand.csv")
    write_json(rows / "hand.json", read_json(rows / "plain.json") | {"name": "hand"})
    benchmark = read_benchmark(hand)
    kinds = {plot.kind for plot in draw(benchmark, summarize(benchmark)) if plot.evaluation == "digits-validation"}
    assert kinds == {"radii"}


def test_an_alarm_of_an_earlier_attack_is_not_hidden(hand: Path) -> None:
    path = hand / "evaluations" / "digits-validation" / "hand.json"
    alarm = {"index": 2, "certified_radius": 0.6, "adversarial_norm": 0.4}
    path.write_text(json.dumps(read_json(path) | {"alarms": [alarm]}))
    build_report(hand)
    row, plain = read_json(hand / "summary.json")["evaluations"][0]["models"]
    assert (row["alarm_count"], plain["alarm_count"], row["attacked"]) == (1, None, None)
    page = (hand / "report.html").read_text(encoding="utf-8")
    assert "<strong>1 alarm.</strong>" in page
    assert "hand: 1 alarm<" in section(page, 0)
    assert "| – |\n" in (hand / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda text: text.replace("certified_radius", "radius"), "column 'certified_radius' is missing"),
        (lambda text: text.replace("1.2", "nan"), "NaN or negative; run `robustflow certify` again"),
        (lambda text: text[: text.index("\n5,") + 1], "cut off: 5 rows"),
    ],
)
def test_damage_is_one_line(hand: Path, harm: Callable[[str], str], message: str) -> None:
    path = hand / "evaluations" / "digits-validation" / "hand.csv"
    path.write_text(harm(path.read_text()))
    with pytest.raises(UserError, match=message):
        build_report(hand)


def test_one_side_attacked_and_the_other_not_are_compared_by_their_radii(hand: Path, tmp_path: Path) -> None:
    rows = hand / "evaluations"
    (rows / "digits-validation" / "evaluation.json").write_text(
        (rows / "digits-test" / "evaluation.json").read_text().replace('"paper",', "").replace('"standard"', "")
    )
    found = compare.compare(
        compare.read(rows / "digits-validation/hand.csv"), compare.read(rows / "digits-test/hand.csv")
    )
    assert set(found.table["quantity"]) == {"clean", "certified"}
    assert found.notes == [f"attacked accuracy left out: no attacks in {rows / 'digits-validation/hand.csv'}"]
    assert (found.table["difference"] == 0).all()
    compare_files.save(found, tmp_path / "cmp")
    assert (tmp_path / "cmp" / "compare.png").is_file()


# --- over seeds


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Test attacked, validation not: of 10 images the first ones are right, certified, attacked in vain."""
    counts = {0: {"a": (8, 6, 7), "b": (8, 3, 8), "plain": (10, 0, 1)}, 1: {"a": (8, 5, 7), "plain": (10, 0, 0)}}
    about = {"schema_version": 1, "dataset": "digits", "n": 10, "epsilons": [0.0, 36 / 255, 0.5]}
    for seed, models in counts.items():
        folder = tmp_path / "out" / f"seed-{seed}"
        config = {"name": "hand", "title": "By hand", "dataset": "digits"}
        write_json(folder / "config.json", config | {"models": [{"name": name} for name in ("a", "b", "plain")]})
        for name, (right, certified, standing) in models.items():
            card = {"name": name, "regime": "sharp", "parameters": 9, "config": {}, "seconds": {"train": 9.0}}
            card |= {"schema_version": 1, "seed": seed, "sha256": f"{seed}{name}"}
            write_json(folder / "models" / name / "card.json", card)
            radii = [0.6 if i < certified else 0.0 for i in range(10)]
            norms = [0.0 if i >= right else math.inf if i < standing else 0.4 for i in range(10)]
            lines = ["index,label,prediction,certified_radius"]
            lines += [f"{i},1,{int(i < right)},{radius}" for i, radius in enumerate(radii)]
            more = [",adversarial_norm,attack,norm_standard", *(f",{norm},,{norm}" for norm in norms)]
            for split, sets in (("validation", []), ("test", ["standard"])):
                rows = folder / "evaluations" / f"digits-{split}"
                write_json(rows / "evaluation.json", about | {"split": split, "attack_sets": sets})
                seconds = {"certify": 1.0} | ({"attack": 2.0} if sets else {})
                bound = None if name == "plain" else 0.9
                write_json(rows / f"{name}.json", {"name": name, "lipschitz_bound": bound, "seconds": seconds})
                text = [line + end * bool(sets) for line, end in zip(lines, more, strict=True)]
                (rows / f"{name}.csv").write_text("\n".join(text) + "\n")
    return tmp_path / "out"


def test_seeds_by_hand(planted: Path) -> None:
    seeds = read_seeds(seed_directories(planted))
    summary = summarize_seeds(seeds)
    assert [e["split"] for e in summary["evaluations"]] == ["validation", "test"]
    figures = summary["evaluations"][0]
    check_nulls(figures)
    a, b, plain = figures["models"]
    # 6 and 5 of 10: mean 0.55; up to ε = 0.5 the areas are 0.3 and 0.25.
    assert (a["certified"][2]["values"], a["certified"][2]["mean"]) == ([0.6, 0.5], 0.55)
    assert (a["area"]["certified"]["values"], a["area"]["attacked"]) == ([0.3, 0.25], None)
    assert (a["clean"]["mean"], b["seeds"], plain["certifies"]) == (0.8, [0], False)
    (group,) = figures["differences"]
    (other,) = group["others"]
    assert (other["name"], other["attacked"]) == ("b", None)
    assert other["certified"][2]["difference"] == pytest.approx(-0.25)
    models = {model["name"]: model for model in summary["models"]}
    assert (models["a"]["seconds"]["attack"], models["a"]["alarm_count"]) == (4.0, 0)  # 2 s a seed, on test alone
    assert summary["notes"] == ["b: not trained with seed 1"]
    assert summary["evaluations"][1]["models"][0]["attacked"][2]["mean"] == 0.7
    plots = {plot.kind: plot for plot in draw_seeds(seeds, summary) if plot.evaluation == "digits-validation"}
    assert plots.keys() == {"certified", "curves", "differences"}
    assert plots["curves"].alt.startswith("Certified accuracy against ε")


def test_page_and_tables_over_seeds(planted: Path) -> None:
    build_report(planted)
    table = (planted / "table.md").read_text(encoding="utf-8")
    validation, test = table.split("\n## ")[1:]
    assert validation.startswith("digits, validation")
    assert validation.count("ttack") == NOT_ATTACKED.count("ttack")
    assert "| area certified | bound L | parameters | multiply-adds | epochs | training |\n" in validation
    assert "attacked, minus a" in test
    with (planted / "table.csv").open(newline="") as file:
        first, *_, last = csv.DictReader(file)
    assert {first[key] for key in first if "attacked" in key or key == "alarms"} == {""}
    assert (first["split"], first["certified@0.5"], last["alarms"]) == ("validation", "0.55", "0")
    page = (planted / "report.html").read_text(encoding="utf-8")
    assert "certified ≤ attacked on every image of digits, test, for every model and seed." in page
    assert "attacked on the same images, those of digits, validation certified only: <strong>" in page
    check_page(section(page, 0))


def test_seeds_of_which_one_is_attacked_and_one_is_not_contradict_each_other(planted: Path) -> None:
    path = planted / "seed-1" / "evaluations" / "digits-validation" / "evaluation.json"
    path.write_text(json.dumps(read_json(path) | {"attack_sets": ["standard"]}))
    for record in path.parent.glob("*.json"):
        if record != path:
            record.write_text(json.dumps(read_json(record) | {"seconds": {"certify": 1.0, "attack": 2.0}}))
    for name in ("a", "plain"):
        shutil.copy(path.parents[1] / "digits-test" / f"{name}.csv", path.parent)
    with pytest.raises(UserError, match=r"attack_sets is \['standard'\], but \[\] in"):
        build_report(planted)


def test_seeds_of_which_nothing_is_attacked(planted: Path) -> None:
    for folder in planted.glob("seed-*/evaluations/digits-test"):
        shutil.rmtree(folder)
    build_report(planted)
    model = read_json(planted / "summary.json")["models"][0]
    assert (model["alarm_count"], model["seconds"]["attack"]) == (None, None)
    assert "No alarms" not in (planted / "report.html").read_text(encoding="utf-8")
