"""Small networks trained on the embedded digits in a few seconds, for measurements that need trained weights."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from robustflow import data
from robustflow.networks import Classifier, create_model

CHANNELS, STEPS, BATCH, RATE = (16, 32), 800, 128, 3e-3
# Logits of a 1-Lipschitz network are small: without this the loss would ask for margins that cannot be had.
SHARPNESS = 30.0


@functools.cache
def trained(regime: str) -> tuple[Classifier, float]:
    """(network, test accuracy) of a regime with convolutions, 16 channels at 8×8 and 32 at 4×4; always the same."""
    images = data.load("digits")
    torch.manual_seed(0)
    model = create_model(regime, input_shape=images.input_shape, channels=CHANNELS, layers=2)
    train, test = images.splits["train"], images.splits["test"]
    pixels, labels = train.images(), train.labels
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-3)
    order = torch.Generator().manual_seed(0)
    for _ in tqdm(range(STEPS), desc=f"training {regime} on digits", unit="step", disable=None):
        batch = torch.randint(len(pixels), (BATCH,), generator=order)
        loss = F.cross_entropy(SHARPNESS * model(pixels[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.constrain_()
    model.constrain_(exact=True)
    model.eval()
    with torch.no_grad():
        accuracy = float((model(test.images()).argmax(1) == test.labels).double().mean())
    return model, accuracy
