"""Any classifier, image by image: proved from below where its layers are known, attacked from above in any case.

One call for a network that was trained elsewhere. `robustflow.evaluation` does the same for the models of a benchmark
directory, where every stage is kept on disk.
"""

from __future__ import annotations

import copy
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import attacks as suite
from attacks.inputs import check_epsilons, check_images, check_indices, check_labels, check_radii, check_range
from robustflow import certificates
from robustflow.alarms import find_alarms
from robustflow.certificates import Certificate
from robustflow.errors import UserError
from robustflow.statistics import Rate

Model = Callable[[Tensor], Tensor]
EPSILONS = (36 / 255, 72 / 255, 108 / 255, 0.5)
VERDICTS = ("certified", "attacked", "undecided", "broken")


@dataclass(frozen=True)
class Bracket:
    """What `evaluate` found out about a classifier.

    ``samples``: a row an image: index, label, prediction, certified_radius (NaN where nothing could be certified, which
    is not the 0 of an image that was looked at in vain), adversarial_norm (0 where misclassified, inf where no
    adversarial was found), attack (the one that found it; "clean" and "" there).

    ``summary``: a row an ε: epsilon, n, and as shares of n, each followed by its 95 % Wilson interval (NAME_low,
    NAME_high): certified (right, radius > ε), attacked (right, no adversarial of norm <= ε found), undecided (neither
    certified nor broken), broken (wrong, or an adversarial of norm <= ε). NaN for "certified" without a certificate.

    ``alarms``: images with an adversarial inside their certified ball, that is, wrong certificates. Each tells whether
    it stands in float64 (None: the model does not run in float64). ``adversarials``: (n, C, H, W) float32, the clean
    image where none was found. ``seconds``: of the stages certify and attack.
    """

    epsilons: list[float]
    attacks: str
    samples: pd.DataFrame = field(repr=False)
    summary: pd.DataFrame = field(repr=False)
    certificate: Certificate | None = field(repr=False)
    why_not_certified: str | None
    alarms: list[dict[str, Any]]
    warnings: list[str]
    adversarials: Tensor = field(repr=False)
    forward_passes: dict[str, int] = field(repr=False)
    seconds: dict[str, float] = field(repr=False)

    @property
    def accuracy(self) -> Rate:
        """Images that are classified right without any attack."""
        return Rate(int((self.samples["prediction"] == self.samples["label"]).sum()), len(self.samples))

    def __str__(self) -> str:
        """The summary to read, in percent with its intervals, then what the reader has to know of it."""
        lines = [f"accuracy {_percent(*self.accuracy.as_dict().values())} on n = {len(self.samples)} images"]
        lines.append("".join(f"{head:>22}" for head in ("epsilon", *VERDICTS)))
        for row in self.summary.to_dict("records"):
            cells = [_percent(0, 0, row[v], row[f"{v}_low"], row[f"{v}_high"]) for v in VERDICTS]
            lines.append("".join(f"{cell:>22}" for cell in (f"{row['epsilon']:.6g}", *cells)))
        lines += [] if self.why_not_certified is None else [f"not certified: {self.why_not_certified}"]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def _percent(_k: float, _n: float, value: float, low: float, high: float) -> str:
    return "–" if np.isnan(value) else f"{100 * value:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def evaluate(
    model: Model,
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int],
    epsilons: Sequence[float] = EPSILONS,
    attacks: str = "standard",
    *,
    certify: bool = True,
    radii: Tensor | np.ndarray | Sequence[float] | None = None,
    audit: bool | None = None,
    batch_size: int = 250,
    device: str | torch.device = "cpu",
    seed: int = 0,
    indices: Sequence[int] | Tensor | np.ndarray | None = None,
    eight_bit: bool = False,
    folder: Path | str | None = None,
    executor: str = "serial",
    workers: int | None = None,
    identity: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Bracket:
    r"""Certified radius :math:`r_i` and smallest adversarial norm found :math:`d_i` of every image.

    .. math:: r_i \le \min \{\|\delta\|_2 : \arg\max f(x_i + \delta) \ne y_i,\ x_i + \delta \in [0, 1]\} \le d_i

    The left side is `robustflow.certify` (margin over Lipschitz bound, Tsuzuku et al., arXiv 1802.04034), the right
    side `attacks.sweep`. A model with a layer that has no Lipschitz rule is attacked only; ``why_not_certified`` names
    the layer.

    Args:
        model: images (n, C, H, W) in [0, 1] to logits (n, K); a module in evaluation mode, on ``device``.
        images, labels: floats in [0, 1], not normalised (that is part of the model), and integers.
        epsilons: L2 radii in pixels of [0, 1], increasing.
        attacks: a set, an attack, or a comma list (``robustflow list attacks``).
        certify: whether to try a certificate.
        radii: (n,) certified radii of your own, tested in place of ours; where the prediction is wrong they count as 0.
        audit: attack certified images, too: the test of the certificate. None: if ``radii`` are given.
        eight_bit: adversarials are rounded to multiples of 1/255, as a saved image would be.
        indices: places of the images in their data set, which seed the attacks' randomness; default 0, 1, 2, …
        folder: where finished shards are kept, so that the same call goes on after a kill; None keeps nothing.
        executor, workers: "serial", "workers" or "ray", see `attacks.sharded_sweep`.
        identity: with ``folder``, what names a model that is no module.
        progress: called with (text, done, total) while attacks run.

    Raises:
        UserError: input that cannot be evaluated, or a model that returns NaN or the wrong shape; one line each.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).eval()
    >>> with torch.no_grad():
    ...     _ = net[1].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    ...     _ = net[1].bias.copy_(torch.tensor([-2.5, 0.0]))
    >>> image = torch.full((1, 1, 1, 2), 0.5)  # (3.5 - 2.5)/5 away from the decision boundary
    >>> bracket = evaluate(net, image, [0], epsilons=[0.1, 0.3])
    >>> bracket.samples[["certified_radius", "adversarial_norm"]].round(3).values.tolist()
    [[0.2, 0.2]]
    >>> bracket.summary[["epsilon", "certified", "attacked", "broken"]].values.tolist()
    [[0.1, 1.0, 1.0, 0.0], [0.3, 0.0, 0.0, 1.0]]
    """
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UserError(f"unknown device {device!r}: cpu, cuda or cuda:INDEX") from None
    if not isinstance(seed, int):
        raise UserError(f"seed must be an integer, not {seed!r}")
    try:
        pixels = check_images(images).cpu()
        truth, grid = check_labels(labels, len(pixels)).cpu(), check_epsilons(epsilons)
        places = check_indices(indices, len(pixels))
        own = None if radii is None else check_radii(radii, len(pixels))
        suite.resolve(attacks)
        _probe(model, pixels, truth, place)
        certificate, reason, seconds = None, None, {"certify": 0.0, "attack": 0.0}
        if own is None:
            started = time.perf_counter()
            certificate, reason = _certificate(model, pixels, truth, certify, batch_size)
            seconds["certify"] = time.perf_counter() - started
        known = own if certificate is None else certificate.radii
        options = {
            "certified_radii": known,
            "audit": own is not None if audit is None else audit,
            "batch_size": batch_size,
            "device": place,
            "seed": seed,
            "indices": places,
            "progress": progress,
        } | ({"eight_bit": True} if eight_bit else {})
        started = time.perf_counter()
        result = _sweep(model, pixels, truth, grid, attacks, Path(folder) if folder else None, options,
                        executor=executor, workers=workers, identity=identity)  # fmt: skip
        seconds["attack"] = time.perf_counter() - started
    except suite.AttackInputError as error:
        raise UserError(str(error)) from error
    samples = result.samples.copy()
    if own is not None:  # many certificates protect a prediction whether right or wrong; ours are about right ones
        known = np.where(samples["prediction"] == samples["label"], own, 0.0)
    samples.insert(3, "certified_radius", np.full(len(samples), np.nan) if known is None else known)
    return Bracket(
        epsilons=grid.tolist(),
        attacks=attacks,
        samples=samples,
        summary=summarize(samples, grid.tolist()),
        certificate=certificate,
        why_not_certified=reason,
        alarms=find_alarms(model, samples, pixels, result.adversarials),
        warnings=list(result.warnings),
        adversarials=result.adversarials,
        forward_passes=dict(result.forward_passes),
        seconds=seconds,
    )


def _probe(model: Model, images: Tensor, labels: Tensor, device: torch.device) -> None:
    """Try the model on two images, so that what is wrong is told before anything is certified or attacked."""
    victim = suite.Victim(model)
    if isinstance(model, nn.Module):
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.device.type != device.type:
                raise UserError(f"{name} of the model is on {tensor.device}, not on {device}: move the model there, or "
                                f"pass device={str(tensor.device)!r}")  # fmt: skip
    try:
        logits = victim.verified_logits(images[:2].to(device))
    except suite.AttackInputError:
        raise
    except Exception as error:  # whatever a stranger's forward raises
        shape, line = tuple(images.shape[1:]), (str(error).splitlines() or [""])[0]
        raise UserError(f"the model fails on images of shape {shape}: {type(error).__name__}: {line}") from error
    check_range(labels, logits.shape[1])


def _certificate(
    model: Model, images: Tensor, labels: Tensor, wanted: bool, batch_size: int
) -> tuple[Certificate | None, str | None]:
    """The certificate, or why there is none. Images, labels and logits are known to be sound by now: what `certify`
    still refuses is the network, and that is no reason not to attack it."""
    if not wanted:
        return None, "certify=False"
    if not isinstance(model, nn.Module):
        return None, f"the model is a {type(model).__name__}, not a torch.nn.Module: its layers are not known"
    try:
        copy.deepcopy(model)  # what certify works on
    except Exception as error:  # a lock, a stream, weights that are not leaves: whatever a stranger's module holds
        return None, f"the model cannot be copied: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    try:
        return certificates.certify(model, images, labels, batch_size=batch_size), None
    except UserError as error:
        return None, str(error)


def _sweep(
    model: Model, images: Tensor, labels: Tensor, grid: np.ndarray, attacks: str, folder: Path | None,
    options: dict[str, Any], *, executor: str, workers: int | None, identity: str | None,
) -> suite.SweepResult:  # fmt: skip
    if folder is None and executor == "serial":
        return suite.sweep(model, images, labels, grid.tolist(), attacks, **options)
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="robustflow-") as name:
            # Nothing is resumed from a folder that is about to vanish, so any name will do.
            identity = identity or uuid.uuid4().hex
            return _sweep(model, images, labels, grid, attacks, Path(name), options,
                          executor=executor, workers=workers, identity=identity)  # fmt: skip
    return suite.sharded_sweep(
        model, images, labels, grid.tolist(), attacks,
        folder=folder, identity=identity, executor=executor, workers=workers, **options,
    )  # fmt: skip


def summarize(samples: pd.DataFrame, epsilons: Sequence[float]) -> pd.DataFrame:
    """The summary of per-image rows: see `Bracket`."""
    right = (samples["prediction"] == samples["label"]).to_numpy()
    radius, norm = samples["certified_radius"].to_numpy(), samples["adversarial_norm"].to_numpy()
    rows = []
    for epsilon in epsilons:
        certified, broken = right & (radius > epsilon), norm <= epsilon
        masks = (certified, right & ~broken, ~certified & ~broken, broken)
        row: dict[str, float] = {"epsilon": float(epsilon), "n": len(samples)}
        for name, mask in zip(VERDICTS, masks, strict=True):
            rate = Rate(int(mask.sum()), len(samples))
            missing = name == "certified" and bool(np.isnan(radius).any())
            values = (np.nan,) * 3 if missing else (rate.value, rate.low, rate.high)
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)
