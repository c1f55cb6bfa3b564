"""Ways to keep kernels orthonormal while they are trained: what an update costs, and what the same seconds learn.

| way | the kernel W | what is trained |
|---|---|---|
| momentum | moved along orthogonalised momentum, then one polar iteration (what `robustflow train` does) | W |
| projection | moved by Adam, then the nearest orthonormal matrix, by a singular value decomposition in float64 | W |
| cholesky | L⁻¹V with LLᵀ = VVᵀ | V |
| cayley | the first rows of (I − A)(I + A)⁻¹, A = V − Vᵀ | V, square |
| exponential | the first rows of exp(V − Vᵀ) | V, square |

The last three are parametrisations: every step differentiates through them. All five train the same network.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from robustflow import bench, data
from robustflow.certificates import certify
from robustflow.config import ModelConfig, TrainConfig, from_dict
from robustflow.data import ImageSet
from robustflow.image_task import ImageTask
from robustflow.measurements.family import Record, Request
from robustflow.memory import keep_freed_memory
from robustflow.networks import Classifier, Constrained
from robustflow.operators import PatchConvolution
from robustflow.optimizers import Muon, build_optimizers, schedule
from robustflow.statistics import Rate
from robustflow.training import generator

SIZES, REPEATS = (256, 512, 768), 3
DATASET, CHANNELS, BATCH, SECONDS, IMAGES, EPSILON = "cifar10", [32, 64], 512, 30.0, 2000, 36 / 255
# Learning rates that are tried for every way; of torch's optimizers' the usual ones.
RATES = {"momentum": (0.01, 0.02, 0.04)}
ADAM_RATES = (1e-3, 3e-3, 1e-2)

Map = Callable[[Tensor], Tensor]


def cholesky(v: Tensor) -> Tensor:
    """L⁻¹V with LLᵀ = VVᵀ: orthonormal rows, or columns if V is tall.

    >>> w = cholesky(torch.tensor([[3.0, 4.0, 0.0], [1.0, 0.0, 2.0]]))
    >>> torch.allclose(w @ w.T, torch.eye(2), atol=1e-6)
    True
    """
    wide = v if v.shape[0] <= v.shape[1] else v.T
    found = torch.linalg.solve_triangular(torch.linalg.cholesky(wide @ wide.T), wide, upper=False)
    return found if v.shape[0] <= v.shape[1] else found.T


def cayley(v: Tensor) -> Tensor:
    """(I − A)(I + A)⁻¹ = 2(I + A)⁻¹ − I with A = V − Vᵀ."""
    identity = torch.eye(len(v), device=v.device, dtype=v.dtype)
    return 2 * torch.linalg.inv(identity + v - v.T) - identity


def exponential(v: Tensor) -> Tensor:
    """exp(V − Vᵀ)."""
    return torch.linalg.matrix_exp(v - v.T)


@dataclass(frozen=True)
class Way:
    """``map`` makes the kernel of what is trained; None: the kernel itself is trained, and brought back."""

    name: str
    map: Map | None = None
    square: bool = False

    def rates(self) -> tuple[float, ...]:
        return RATES.get(self.name, ADAM_RATES)


WAYS = (
    Way("momentum"),
    Way("projection"),
    Way("cholesky", cholesky),
    Way("cayley", cayley, square=True),
    Way("exponential", exponential, square=True),
)


def _start(way: Way, weight: Tensor) -> nn.Parameter:
    """Where training begins: of maps of square matrices a random rotation (‖V − Vᵀ‖ is about √2), else the kernel."""
    size = max(weight.shape)
    square = torch.randn(size, size, dtype=weight.dtype) * (0.5 / size**0.5)
    return nn.Parameter(square if way.square else weight.detach().clone())


class Trainee:
    """A network whose orthonormal kernels are kept in one of the ways."""

    def __init__(self, way: Way, model: Classifier, config: TrainConfig) -> None:
        self.way, self.model, self.config = way, model, config
        self.kernels = {
            f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, PatchConvolution)
        }
        self.raw = {name: _start(way, module.weight) for name, module in self.kernels.items()}
        if way.name == "momentum":
            self.optimizers = build_optimizers(model, config)
        else:
            kernels = {id(module.weight) for module in self.kernels.values()}
            rest = [parameter for parameter in model.parameters() if id(parameter) not in kernels]
            trained = list(self.raw.values()) if way.map else [module.weight for module in self.kernels.values()]
            self.optimizers = [
                torch.optim.Adam(trained, config.muon_learning_rate, betas=(0.9, 0.99)),
                torch.optim.NAdam(rest, config.learning_rate, betas=(0.9, 0.99)),
            ]
        self.rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]

    def made(self) -> dict[str, Tensor]:
        """The kernels that are not parameters of the model."""
        if self.way.map is None:
            return {}
        shapes = {name: module.weight.shape for name, module in self.kernels.items()}
        return {name: self.way.map(raw)[: shapes[name][0], : shapes[name][1]] for name, raw in self.raw.items()}

    def step(self, loss: Callable[[Callable[[Tensor], Tensor]], Tensor], share: float) -> None:
        made = self.made()
        value = loss(lambda images: functional_call(self.model, made, (images,)))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        value.backward()
        factor = schedule(self.config, share)
        rates = iter(self.rates)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = next(rates) * factor
            optimizer.step()
        self._constrain()

    def _constrain(self) -> None:
        for module in self.model.modules():
            if isinstance(module, PatchConvolution):
                if self.way.map is None:
                    module.constrain_(exact=self.way.name == "projection")
            elif module is not self.model and isinstance(module, Constrained):
                module.constrain_()

    @torch.no_grad()
    def finish(self) -> None:
        for name, weight in self.made().items():
            self.kernels[name].weight.copy_(weight)
        self.model.constrain_(exact=True)


# ---------------------------------------------------------------------------------------------------------------- cost
def cost(size: int, way: Way) -> Record:
    """Seconds that one update of a square kernel takes beside the layer's own products; the defect ‖WWᵀ − I‖₂."""
    torch.manual_seed(0)
    operator = PatchConvolution(size, size, patch=1)
    gradient = torch.randn(size, size) / size
    raw = operator.weight if way.map is None else _start(way, operator.weight)
    optimizer: torch.optim.Optimizer = torch.optim.Adam([raw], ADAM_RATES[0])
    if way.name == "momentum":
        optimizer = Muon([raw], RATES["momentum"][0], 0.9, torch.float32)
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        if way.map is None:
            raw.grad = gradient
        else:
            optimizer.zero_grad()
            way.map(raw).backward(gradient)
        optimizer.step()
        if way.map is None:
            operator.constrain_(exact=way.name == "projection")
        seconds.append(time.perf_counter() - started)
    with torch.no_grad():
        kernel = (raw if way.map is None else way.map(raw)).double()
    defect = float(torch.linalg.matrix_norm(kernel @ kernel.T - torch.eye(size, dtype=torch.float64), 2))
    return {"way": way.name, "size": size, "seconds": min(seconds[1:]), "defect": defect}


# ------------------------------------------------------------------------------------------------------------ learning
def learn(way: Way, rate: float, images: ImageSet) -> Record:
    """Train the network for `SECONDS` seconds of steps; what of the validation images is then certified."""
    subject = _subject(rate, images)
    torch.manual_seed(0)
    model = bench.build_model(subject, images)
    task = ImageTask(model, images, subject.train, device=torch.device("cpu"))
    trainee = Trainee(way, model, subject.train)
    started = time.perf_counter()
    steps, per_epoch = 0, task.size // BATCH
    while (share := (time.perf_counter() - started) / SECONDS) < 1:
        epoch, place = divmod(steps, per_epoch)
        if place == 0:
            order = torch.randperm(task.size, generator=generator(0, epoch, 0))
        trainee.step(partial(_loss, task, order[place * BATCH :][:BATCH], generator(0, steps, 1)), share)
        steps += 1
    trainee.finish()
    validation = images.splits["validation"].head(IMAGES)
    certificate = certify(model.eval(), validation.images(), validation.labels)
    row = {"way": way.name, "rate": rate, "steps": steps, "n": len(validation)}
    for name, epsilon in (("clean", 0.0), ("certified", EPSILON)):
        share_of = Rate(int((certificate.radii > epsilon).sum()), len(validation))
        row |= {name: share_of.value, f"{name}_interval": [share_of.low, share_of.high]}
    return row


def _loss(task: ImageTask, batch: Tensor, drawn: torch.Generator, model: Callable[[Tensor], Tensor]) -> Tensor:
    return task.loss(batch, drawn, 0.0, model)[0]


def _subject(rate: float, images: ImageSet) -> ModelConfig:
    return from_dict(
        {
            "title": "orthogonality",
            "dataset": DATASET,
            "network": {"channels": CHANNELS, "layers": 2, "kernel": "patch", "lift": "patch"},
            "train": {"epochs": 1, "batch_size": BATCH, "muon_learning_rate": rate},
            "evaluate": {"epsilons": [EPSILON]},
            "models": [{"name": "nonexpansive", "regime": "nonexpansive"}],
        }
    ).models[0]


def orthogonality(request: Request) -> Record:
    images = data.load(DATASET, request.data)
    keep_freed_memory()
    costs = [cost(size, way) for size, way in itertools.product(SIZES, WAYS)]
    runs = [(way, rate) for way in WAYS for rate in way.rates()]
    bar = tqdm(runs, desc="orthogonality", unit="training", disable=None)
    learned = [learn(way, rate, images) for way, rate in bar]
    settings = {"dataset": DATASET, "channels": CHANNELS, "batch": BATCH, "train_seconds": SECONDS, "epsilon": EPSILON}
    return {"settings": settings, "cost": costs, "learning": learned}
