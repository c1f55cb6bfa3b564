"""The files of a bracket: samples.csv, summary.csv, summary.json, bracket.png and the pairs of its alarms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from robustflow import checkpoints
from robustflow.bracket import Bracket
from robustflow.style import EPSILON, GREY, INK, colour, house_style, png, robust_accuracy_axes, short, survival

SCHEMA_VERSION = 1


def save(bracket: Bracket, images: Tensor, out: Path, title: str, facts: dict[str, Any]) -> None:
    """Write a bracket into ``out``; ``facts`` (model, config, seed, environment) go into summary.json as they are."""
    alarms = _save_alarms(bracket, images, out / "alarms")
    checkpoints.write_text(out / "samples.csv", bracket.samples.to_csv(index=False, lineterminator="\n"))
    checkpoints.write_text(out / "summary.csv", bracket.summary.to_csv(index=False, lineterminator="\n"))
    certificate = bracket.certificate
    content = {
        "schema_version": SCHEMA_VERSION,
        **facts,
        "n": len(bracket.samples),
        "attacks": bracket.attacks,
        "accuracy": bracket.accuracy.as_dict(),
        "summary": _records(bracket.summary),
        "lipschitz_bound": None if certificate is None else checkpoints.finite(certificate.lipschitz),
        "certified_object": None if certificate is None else certificate.certified_object,
        "why_not_certified": bracket.why_not_certified,
        "account": [] if certificate is None else _records(pd.DataFrame(certificate.account.rows())),
        "alarms": alarms,
        "warnings": bracket.warnings,
        "forward_passes": bracket.forward_passes,
        "seconds": {stage: round(seconds, 3) for stage, seconds in bracket.seconds.items()},
    }
    checkpoints.write_json(out / "summary.json", content)
    with house_style():
        picture = png(draw(bracket, title))
    with checkpoints.replacing(out / "bracket.png") as partial:
        partial.write_bytes(picture)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for JSON, which has no NaN and no infinity: null."""
    return [
        {str(key): checkpoints.finite(value) if isinstance(value, float) else value for key, value in row.items()}
        for row in frame.to_dict("records")
    ]


def _save_alarms(bracket: Bracket, images: Tensor, folder: Path) -> list[dict[str, Any]]:
    """A file an alarm, the image with its adversarial; those of an earlier run go."""
    for stale in folder.glob("*.safetensors"):
        stale.unlink()
    places = {int(index): place for place, index in enumerate(bracket.samples["index"])}
    alarms = []
    for alarm in bracket.alarms:
        place, file = places[alarm["index"]], f"{alarm['index']}.safetensors"
        pair = {"image": images[place], "adversarial": bracket.adversarials[place]}
        checkpoints.write_tensors(folder / file, pair, {"index": alarm["index"]})
        alarms.append(alarm | {"file": f"{folder.name}/{file}"})
    return alarms


def draw(bracket: Bracket, title: str) -> Figure:
    """Proved below the certified curve, broken above the attacked one, undecided between them.

    Both curves are the exact step functions of the rows; the points with 95 % Wilson intervals are the summary.
    """
    limit, ink = bracket.epsilons[-1] or 1.0, colour(0)
    samples = bracket.samples
    right = (samples["prediction"] == samples["label"]).to_numpy()
    certified = np.where(right, np.nan_to_num(samples["certified_radius"], posinf=np.inf), 0.0)
    attacked = np.where(right, samples["adversarial_norm"], 0.0)
    known = not samples["certified_radius"].isna().any()
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.subplots()
    steps = [survival(values, limit) for values in (certified, attacked)]
    x = np.union1d(steps[0][0], steps[1][0])
    low, high = (y[np.searchsorted(at, x, side="right") - 1] for at, y in steps)
    band = ax.fill_between(x, low, np.maximum(low, high), step="post", color=ink, alpha=0.15, lw=0, label="undecided")
    ax.step(*steps[1], where="post", color=ink, lw=1.3, ls=(0, (4, 1.5)))
    handles = [_points(ax, bracket.summary, "attacked", ink, "attacked: no adversarial found", mfc="white"), band]
    if known:
        ax.fill_between(x, 0, low, step="post", color=ink, alpha=0.4, lw=0)
        ax.step(*steps[0], where="post", color=ink, lw=1.6)
        handles.append(_points(ax, bracket.summary, "certified", ink, "certified: proved"))
    robust_accuracy_axes(ax, limit)
    ax.set_xlabel(EPSILON)
    ax.set_ylabel("robust accuracy (%)")
    ax.set_title(short(title, 48))
    facts = f"n = {len(samples)}; bars: 95 % Wilson intervals" + ("" if known else "; not certified")
    ax.text(0.98, 0.97, facts, transform=ax.transAxes, ha="right", va="top", fontsize=8, color=INK if known else GREY)
    if bracket.alarms:
        text = f"{len(bracket.alarms)} alarm{'s' if len(bracket.alarms) > 1 else ''}: the certificate is wrong"
        ax.text(0.98, 0.9, text, transform=ax.transAxes, ha="right", va="top", fontsize=8, color="#c00000",
                weight="bold")  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _points(ax: Any, summary: pd.DataFrame, name: str, ink: str, label: str, **style: Any) -> Any:
    """The grid's rates with their intervals."""
    value, low, high = (100 * summary[key].to_numpy() for key in (name, f"{name}_low", f"{name}_high"))
    reach = np.maximum([value - low, high - value], 0)
    return ax.errorbar(
        summary["epsilon"], value, reach, fmt="o", ms=4, lw=1, color=ink, clip_on=False, zorder=4, label=label, **style
    )
