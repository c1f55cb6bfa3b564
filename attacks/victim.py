"""The model under attack: a callable from images in [0, 1] to logits, frozen and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class AttackInputError(ValueError):
    """What the caller passed cannot be attacked; the message is one line that says what to change."""


class Victim:
    r"""A classifier :math:`f : [0, 1]^{C \times H \times W} \to \mathbb{R}^K` that counts its forward passes.

    It casts images to the dtype of the model's parameters, so a float64 model can be attacked with float32 images.

    Shape: images (N, C, H, W) -> logits (N, K).
    Errors: AttackInputError if the model is a module in training mode, if its output is not an (N, K) float tensor
    with K >= 2, if it has no gradient where one is asked for, or (from :meth:`verified_logits`) if it returns NaN or
    infinite logits for finite images.

    >>> victim = Victim(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval())
    >>> victim(torch.rand(5, 1, 2, 2)).shape, victim.passes
    (torch.Size([5, 3]), 5)
    """

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        if not callable(model):
            raise AttackInputError(f"model must be a callable from images to logits, got {type(model).__name__}")
        self.model = model
        self.passes = 0
        self.dtype: torch.dtype | None = None
        if isinstance(model, nn.Module):
            if any(module.training for module in model.modules()):
                raise AttackInputError("the model is in training mode, so its logits are not a function of the image;"
                                       " call model.eval() first")
            self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

    def __call__(self, images: Tensor) -> Tensor:
        self.passes += len(images)
        logits = self.model(images if self.dtype is None else images.to(self.dtype))
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise AttackInputError("the model must return a tensor of floating point logits,"
                                   f" got {getattr(logits, 'dtype', type(logits).__name__)}")
        if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
            raise AttackInputError(f"the model must return logits of shape ({len(images)}, classes) with at least"
                                   f" 2 classes, got {tuple(logits.shape)}")
        if images.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
            raise AttackInputError("the model's logits have no gradient with respect to the image, which this attack"
                                   " follows; take out detach(), no_grad() and comparisons, or use an attack without"
                                   " gradients: hopskipjump or square")
        return logits

    @torch.no_grad()
    def verified_logits(self, images: Tensor) -> Tensor:
        """Logits in float64 of finite images, outside autograd; NaN or infinite logits raise AttackInputError."""
        logits = self(images).double()
        if not torch.isfinite(logits).all():
            row = int((~torch.isfinite(logits)).any(dim=1).nonzero()[0])
            raise AttackInputError(f"the model returned NaN or infinite logits for a finite image (row {row} of its"
                                   " batch); no verdict can be given for such a model")
        return logits

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Freeze parameters and cache parametrised weights inside the block; restore both after, whatever happens.

        foolbox calls ``loss.backward()``, which would otherwise fill every parameter's ``.grad`` (twice the time).
        """
        parameters = list(self.model.parameters()) if isinstance(self.model, nn.Module) else []
        wanted = [p.requires_grad for p in parameters]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            with parametrize.cached():
                yield
        finally:
            for parameter, flag in zip(parameters, wanted, strict=True):
                parameter.requires_grad_(flag)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    r"""The margin :math:`m = f_y - \max_{j \ne y} f_j`: positive when right, negative when misclassified.

    Shape: logits (N, K), labels (N,) -> (N,), in the logits' units.

    >>> margins(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([1]))
    tensor([-2.])
    """
    own = labels[:, None]
    others = logits.scatter(1, own, -torch.inf)
    return logits.gather(1, own)[:, 0] - others.amax(dim=1)


def l2_norms(delta: Tensor) -> Tensor:
    """Euclidean norm of every image of a batch, measured in float64. Shape: (N, ...) -> (N,)."""
    return delta.double().flatten(1).norm(dim=1)
