"""A benchmark directory made by hand: the files that training and evaluation write, with made-up verdicts."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

GRID = [0.0, 8 / 255, 16 / 255, 36 / 255, 72 / 255, 0.3, 108 / 255, 0.5, 0.6, 0.8, 1.0]
REGIMES = ["unconstrained", "naive", "nonexpansive", "prescribed", "flexible", "sharp", "shared"]


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def card(name: str, regime: str, **changes: Any) -> dict[str, Any]:
    versions = {"python": "3.11.7", "torch": "2.13.0", "robustflow": "0.1.0"}
    return {
        "schema_version": 1,
        "name": name,
        "regime": regime,
        "description": f"made up, {regime}",
        "parameters": 888575,
        "multiply_adds": 350_123_456,
        "config": {"width": 32, "margin": 0.3, "optimizer": {"name": "sgd", "lr": 0.01}},
        "seed": 7,
        "seconds": {"train": 754.25},
        "environment": {"versions": versions, "device": "cpu", "cpu": "made up", "revision": "0123abc"},
        "data": {"dataset": "digits", "train_n": 1200, "validation_n": 200},
        "sha256": "00" * 32,
    } | changes


def model_card(name: str, bound: float | None, **changes: Any) -> dict[str, Any]:
    account = [
        {"layer": "normalize", "kind": "Normalize", "formula": "max 1/σ", "bound": 5.0, "product": 5.0},
        {"layer": "features.0", "kind": "Convolution", "formula": "‖A‖ ≤ Gershgorin", "bound": 0.2, "product": 1.0},
    ]
    return {
        "name": name,
        "lipschitz_bound": bound,
        "certified_object": "logits in float32, weights as stored",
        "account": account if bound is not None else [],
        "seconds": {"certify": 1.5, "attack": 60.25},
        "forward_passes": {"margin-pgd": 12000, "deepfool": 4000},
        "warnings": [],
        "alarms": [],
        "environment": {"device": "cpu"},
        "falsifier": {"observed": 0.8, "claimed": bound, "ratio": 0.8 / bound} if bound else None,
    } | changes


def write_benchmark(
    out: Path,
    *,
    names: list[str] | None = None,
    n: int = 300,
    shape: tuple[int, int, int] = (1, 8, 8),
    sets: tuple[str, ...] = ("paper", "standard"),
    scale: float = 0.6,
    null_bound: tuple[str, ...] = ("unconstrained",),
    seed: int = 0,
) -> Path:
    """A whole benchmark with plausible random verdicts; models in null_bound have no certificate."""
    names = names or ["unconstrained", "sharp"]
    rng = np.random.default_rng(seed)
    classes = [str(i) for i in range(10)]
    if shape[0] == 3:
        classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    models = [{"name": name, "regime": REGIMES[i % 6]} for i, name in enumerate(names)]
    write_json(
        out / "config.json",
        {"name": "made-up", "title": "A made-up benchmark", "command": "robustflow bench made-up", "models": models},
    )
    folder = out / "evaluations" / "digits-test"
    evaluation = {"schema_version": 1, "dataset": "digits", "split": "test", "n": n, "epsilons": GRID}
    write_json(folder / "evaluation.json", evaluation | {"attack_sets": list(sets), "class_names": classes})
    labels = rng.integers(0, 10, n)
    images = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
    if shape[0] == 3:
        y, x = np.mgrid[0 : shape[1], 0 : shape[2]] / shape[1]
        hue = rng.uniform(0.2, 1, (n, 3, 1, 1))
        images = (
            255 * np.clip(hue * (0.5 + 0.5 * np.sin(7 * x * rng.uniform(0.3, 1, (n, 1, 1, 1)) + 4 * y)), 0, 1)
        ).astype(np.uint8)
    for place, (name, model) in enumerate(zip(names, models, strict=True)):
        write_json(out / "models" / name / "card.json", card(name, model["regime"]))
        epochs = 12
        lines = [
            {
                "epoch": e, "step": 10 * e, "lr": 0.01, "seconds": 60.0 * e,
                "loss": 2.0 * math.exp(-e / (4 + place)) + 0.1,
                "train_accuracy": 0.95 - 0.8 * math.exp(-e / (3 + place)), "validation_n": 200,
                "validation_accuracy": None if e % 2 else 0.92 - 0.8 * math.exp(-e / (3 + place)) - 0.01 * place,
            }
            for e in range(1, epochs + 1)
        ]  # fmt: skip
        (out / "models" / name / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        wrong = rng.random(n) < 0.08 + 0.02 * place
        predictions = np.where(wrong, (labels + 1) % 10, labels)
        distance = rng.gamma(2.2, scale / 2.2 * (0.5 + 0.15 * place), n)
        radius = np.zeros(n) if name in null_bound else distance * rng.uniform(0.45, 0.85, n)
        rows = []
        for i in range(n):
            norms = {
                s: float(distance[i] * (1.0 + 0.35 * rng.random() * (k + 1 < len(sets)))) for k, s in enumerate(sets)
            }
            norms = {s: 0.0 if wrong[i] else (math.inf if v > 1.2 else v) for s, v in norms.items()}
            smallest = min(norms.values())
            attack = (
                "clean"
                if wrong[i]
                else ""
                if math.isinf(smallest)
                else str(rng.choice(["margin-pgd", "deepfool", "ddn-rescaled"], p=[0.5, 0.3, 0.2]))
            )
            row = {"index": i, "label": int(labels[i]), "prediction": int(predictions[i])}
            row |= {
                "certified_radius": 0.0 if wrong[i] else float(radius[i]),
                "adversarial_norm": smallest,
                "attack": attack,
            }
            rows.append(row | {f"norm_{s}": v for s, v in norms.items()})
        write_rows(folder / f"{name}.csv", rows)
        write_json(folder / f"{name}.json", model_card(name, None if name in null_bound else 0.9 + 0.01 * place))
        kept = [i for i in range(n) if not wrong[i] and rows[i]["adversarial_norm"] < 1.2][:6]
        noise = rng.standard_normal((len(kept), *shape))
        noise *= (
            np.array([rows[i]["adversarial_norm"] for i in kept])[:, None, None, None]
            / np.linalg.norm(noise.reshape(len(kept), -1), axis=1)[:, None, None, None]
        )
        save_file(
            {
                "index": np.array(kept, dtype=np.int64),
                "label": labels[kept].astype(np.int64),
                "prediction": labels[kept].astype(np.int64),
                "adversarial_prediction": ((labels[kept] + 3) % 10).astype(np.int64),
                "images": images[kept],
                "adversarials": np.clip(images[kept] / 255 + noise, 0, 1).astype(np.float32),
                "norm": np.array([rows[i]["adversarial_norm"] for i in kept]),
            },
            folder / f"{name}.examples.safetensors",
        )  # fmt: skip
    return out


@pytest.fixture(scope="session")
def make_benchmark() -> Callable[..., Path]:
    return write_benchmark


HAND = """index,label,prediction,certified_radius,adversarial_norm,attack,norm_paper,norm_standard
0,0,0,1.2,inf,,inf,inf
1,1,1,0.5,1.0,ddn,inf,1.0
2,0,0,0.6,0.8,ddn,0.9,0.8
3,1,1,0.1,0.5,margin-pgd,inf,0.5
4,0,0,0.0,0.3,l2pgd,0.3,0.4
5,0,1,0.9,0.0,clean,0.0,0.0
6,1,1,0.7,inf,,inf,inf
7,1,0,0.0,0.0,clean,0.0,0.0
"""


@pytest.fixture
def hand_benchmark(tmp_path: Path) -> Path:
    """Eight images and two models, small enough to count on paper; a second evaluation with another grid."""
    out = write_benchmark(tmp_path / "hand", names=["hand", "plain"], n=8, null_bound=("plain",))
    (out / "config.json").write_text(
        json.dumps({"name": "hand", "title": "By hand", "command": "robustflow bench hand"})
    )
    lines = [line.split(",") for line in HAND.splitlines()]
    plain = [lines[0], *([*line[:3], "0.0", *line[4:]] for line in lines[1:])]
    for dataset, grid in (("digits", [0.0, 0.5, 1.0]), ("far", [0.0, 0.5])):
        folder = out / "evaluations" / f"{dataset}-test"
        card = {"schema_version": 1, "dataset": dataset, "split": "test", "n": 8, "epsilons": grid}
        write_json(
            folder / "evaluation.json", card | {"attack_sets": ["paper", "standard"], "class_names": ["no", "yes"]}
        )
        (folder / "hand.csv").write_text(HAND)
        (folder / "plain.csv").write_text("".join(",".join(line) + "\n" for line in plain))
        write_json(folder / "hand.json", model_card("hand", 0.98))
        write_json(folder / "plain.json", model_card("plain", None))
    return out


@pytest.fixture
def alarm() -> Callable[[Path, str], None]:
    """Plant an adversarial inside the certified ball of image 2, recorded as the evaluation would."""

    def plant(out: Path, name: str) -> None:
        folder = out / "evaluations" / "digits-test"
        rows = folder / f"{name}.csv"
        rows.write_text(rows.read_text().replace("2,0,0,0.6,0.8,ddn,0.9,0.8", "2,0,0,0.6,0.4,ddn,0.9,0.4"))
        found = {"index": 2, "certified_radius": 0.6, "adversarial_norm": 0.4, "attack": "ddn"}
        found |= {"confirmed_in_float64": True, "file": f"alarms/{name}-2.safetensors"}
        write_json(folder / f"{name}.json", model_card(name, 0.98, alarms=[found]))

    return plant


@pytest.fixture
def make_trained() -> Callable[..., Path]:
    """A directory OUT/models/NAME of a small network on digits, as `robustflow train` leaves it, but not trained."""

    def make(out: Path, regime: str = "sharp", *, name: str | None = None, **network: Any) -> Path:
        import torch

        from robustflow import checkpoints, create_model
        from robustflow.config import ModelConfig

        options = {"channels": (4, 8), "layers": 2} | network
        folder = out / "models" / (name or regime)
        config = ModelConfig.model_validate(
            {"name": folder.name, "regime": regime, "network": options, "train": {"epochs": 1}}
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            sizes = config.network.model_dump(exclude={"normalize"})
            model = create_model(regime, input_shape=(1, 8, 8), mean=(0.3,), std=(0.5,), **sizes)
            model.constrain_(exact=True)
        checkpoints.write_tensors(folder / "model.safetensors", model.state_dict())
        changes = {"config": config.model_dump(mode="json"), "sha256": checkpoints.sha256(folder / "model.safetensors")}
        write_json(folder / "card.json", card(folder.name, regime, **changes))
        return folder

    return make
