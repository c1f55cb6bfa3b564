"""Copies of modules whose parametrised weights are plain ones: what is stored is what is computed with."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

from robustflow.errors import UserError


def require_settled(module: nn.Module, name: str = "") -> None:
    """Raise UserError where a parametrised part is in training mode: its weight may change whenever it is read."""
    for path, part in module.named_modules(prefix=name):
        made = part.parametrizations if parametrize.is_parametrized(part) else None
        if isinstance(made, nn.ModuleDict) and (part.training or any(m.training for m in made.modules())):
            raise UserError(
                f"{path or 'the module'} has a parametrised weight in training mode: call .eval() first, then what is "
                "stored is what is computed with"
            )


def baked_copy(module: nn.Module) -> nn.Module:
    """A deep copy with every parametrisation (`torch.nn.utils.parametrize`) replaced by the weight that it makes.

    Raises:
        UserError: a parametrised part in training mode.
        RuntimeError: the module cannot be copied (weights that are not leaves of autograd's graph).

    >>> layer = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)).eval()
    >>> type(baked_copy(layer)).__name__, type(layer).__name__
    ('Linear', 'ParametrizedLinear')
    """
    require_settled(module)
    copied = copy.deepcopy(module)
    for part in list(copied.modules()):
        if not parametrize.is_parametrized(part):
            continue
        # Not by parametrize.remove_parametrizations: it takes the weight's property from the parametrised class, which
        # the copy shares with the original, and so breaks the original.
        made = part.parametrizations
        assert isinstance(made, nn.ModuleDict)
        trained = {name: bool(list(stored.parameters(recurse=False))) for name, stored in made.items()}
        with torch.no_grad():
            values = {name: getattr(part, name).detach().clone() for name in trained}
        del part.parametrizations
        part.__class__ = type(part).__bases__[0]
        for name, value in values.items():
            if trained[name]:
                part.register_parameter(name, nn.Parameter(value))
            else:
                part.register_buffer(name, value)
    return copied


__all__ = ["baked_copy", "require_settled"]
