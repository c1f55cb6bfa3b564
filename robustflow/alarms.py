"""Alarms: adversarials found inside certified balls, looked at again in float64 and kept as evidence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from robustflow import checkpoints


def find_alarms(
    model: Callable[[Tensor], Tensor],
    rows: pd.DataFrame,
    images: Tensor,
    adversarials: Tensor,
    *,
    folder: Path | None = None,
    name: str = "model",
) -> list[dict[str, Any]]:
    r"""Images whose smallest adversarial lies inside the certified ball: :math:`0 < \|x' - x\|_2 \le r`.

    Each is judged again by a float64 copy of the model on the CPU: ``confirmed_in_float64`` says whether the copy, too,
    misclassifies it within the radius, and is None where there is no such copy (the model is no module, or does not
    run in float64). With a ``folder`` the pair of images is saved there as NAME.alarm-INDEX.safetensors.

    Shape: ``rows`` has N rows of index, label, certified_radius, adversarial_norm (both in pixels of [0, 1]; NaN: no
    certificate) and attack, in the order of ``images`` and ``adversarials`` (N, C, H, W).

    Raises:
        UserError: the folder cannot be written.

    >>> rows = pd.DataFrame({"index": [7], "label": [0], "certified_radius": [0.2], "adversarial_norm": [0.1],
    ...                      "attack": ["ddn"]})
    >>> image = torch.full((1, 1, 1, 1), 0.5)
    >>> line = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).eval()
    >>> _ = line[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]])), line[1].bias.data.copy_(torch.tensor([-.45, .45]))
    >>> alarm = find_alarms(line, rows, image, image - 0.1)[0]
    >>> alarm["index"], alarm["confirmed_in_float64"]
    (7, True)
    """
    radius, norm = rows["certified_radius"].to_numpy(), rows["adversarial_norm"].to_numpy()
    crossed = np.flatnonzero((radius > 0) & (norm <= radius))
    alarms: list[dict[str, Any]] = []
    if len(crossed) == 0:
        return alarms
    exact = _float64_logits(model, adversarials[torch.from_numpy(crossed)])
    for place, row in enumerate(crossed):
        index = int(rows["index"].iloc[row])
        confirmed: bool | None = None
        if exact is not None:
            distance = float((adversarials[row].double() - images[row].double()).norm())
            wrong = int(exact[place].argmax()) != int(rows["label"].iloc[row])
            confirmed = wrong and distance <= float(radius[row])
        file = None
        if folder is not None:
            file = f"{name}.alarm-{index}.safetensors"
            tensors = {"image": images[row], "adversarial": adversarials[row]}
            checkpoints.write_tensors(folder / file, tensors, {"index": index})
        alarms.append(
            {
                "index": index,
                "certified_radius": float(radius[row]),
                "adversarial_norm": float(norm[row]),
                "attack": str(rows["attack"].iloc[row]),
                "confirmed_in_float64": confirmed,
                "file": file,
            }
        )
    return alarms


def _float64_logits(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor | None:
    """Logits of a float64 copy on the CPU, None if there can be none; the model itself is given back as it was."""
    if not isinstance(model, nn.Module):
        return None
    try:
        exact = copy.deepcopy(model).to("cpu", torch.float64).eval()
        with torch.no_grad():
            return exact(images.cpu().double())
    except (RuntimeError, TypeError, ValueError):  # it makes float32 tensors of its own, or holds what has no copy
        return None
