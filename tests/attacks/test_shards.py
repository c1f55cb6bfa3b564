"""Shards: a sweep in pieces is the sweep, and goes on where it was killed."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized

from attacks import ATTACKS, AttackInputError, SweepResult, expected_passes, sharded_sweep, sweep
from attacks.shard_files import model_identity
from attacks.shards import _agreed

GRID = [0.05, 0.1, 0.2]


class Counting(nn.Module):
    """A small network that knows how many images it has seen, and with how many threads."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.net: nn.Sequential = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.offset = offset
        self.calls: list[tuple[int, int]] = []  # a list, so that it is no part of the model's identity

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append((len(images), torch.get_num_threads()))
        return self.net(images - self.offset)


def toy(count: int = 23) -> tuple[Counting, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Counting().eval()
    images = torch.rand(count, 1, 8, 8)
    labels = model(images).argmax(dim=1)
    labels[::7] = (labels[::7] + 1) % 10
    return model, images, labels


def same(one: SweepResult, two: SweepResult) -> bool:
    return (
        one.samples.equals(two.samples) and torch.equal(one.adversarials, two.adversarials)
        and one.forward_passes == two.forward_passes and one.epsilons == two.epsilons and one.warnings == two.warnings
    )


def test_shards_are_sweeps_of_their_images(tmp_path: Path) -> None:
    model, images, labels = toy()
    radii, indices = np.linspace(0, 0.15, 23), np.arange(100, 123)
    options: dict[str, Any] = {"batch_size": 6, "seed": 3, "audit": False}
    radii.flags.writeable = False  # as a column of a pandas frame is
    result = sharded_sweep(
        model, images, labels, GRID, "l2pgd,ddn,margin-pgd", folder=tmp_path, shard_size=9, certified_radii=radii,
        indices=indices, **options,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a shard's sweep runs: the last bits of a sum depend on the threads
    try:
        parts = [
            sweep(model, images[k], labels[k], GRID, "l2pgd,ddn,margin-pgd", certified_radii=radii[k],
                  indices=indices[k], **options)
            for k in (slice(0, 9), slice(9, 18), slice(18, 23))
        ]
    finally:
        torch.set_num_threads(threads)
    assert result.samples.equals(pd.concat([part.samples for part in parts], ignore_index=True))
    assert torch.equal(result.adversarials, torch.cat([part.adversarials for part in parts]))
    assert result.forward_passes == {k: sum(p.forward_passes[k] for p in parts) for k in parts[0].forward_passes}
    assert result.seconds.keys() == parts[0].seconds.keys()
    assert result.samples["attack"].nunique() > 1
    assert len(list(tmp_path.iterdir())) == 3
    assert {field.name for field in dataclasses.fields(SweepResult)} == {
        "epsilons", "samples", "adversarials", "forward_passes", "seconds", "warnings"
    }, "a new field needs a place in a shard's file"


def test_only_missing_and_broken_shards_are_done_again(tmp_path: Path) -> None:
    model, images, labels = toy()
    first = sharded_sweep(model, images, labels, GRID, folder=tmp_path, shard_size=9)
    files = sorted(tmp_path.iterdir())
    before = [file.read_bytes() for file in files]

    def again() -> int:
        model.calls.clear()
        assert same(sharded_sweep(model, images, labels, GRID, folder=tmp_path, shard_size=9), first)
        return sum(count for count, _ in model.calls)

    assert again() == 0
    assert [file.read_bytes() for file in files] == before
    last = sum(sweep(model, images[18:], labels[18:], GRID, indices=range(18, 23)).forward_passes.values())
    files[2].unlink()
    assert again() == last
    for damage in (b"", b"no shard", before[2][:7], before[2][: len(before[2]) // 2], before[2][:-1], before[1]):
        files[2].write_bytes(damage)  # the last: whole, but of other images
        assert again() == last, damage[:20]
    assert sorted(tmp_path.iterdir()) == files


def test_a_shard_serves_only_what_it_was_made_for(tmp_path: Path) -> None:
    model, images, labels = toy()
    options: dict[str, Any] = {"folder": tmp_path, "shard_size": 23, "certified_radii": np.full(23, 0.07)}
    call: dict[str, Any] = {"images": images, "labels": labels, "epsilons": GRID, "attacks": "l2pgd"} | options
    sharded_sweep(model, **call)
    other_pixel, other_label = images.clone(), labels.clone()
    other_pixel[5, 0, 3, 3] *= 0.999
    other_label[5] = (labels[5] + 1) % 10
    changes: list[dict[str, Any]] = [
        {"images": other_pixel}, {"labels": other_label}, {"epsilons": [0.05, 0.1]}, {"attacks": "margin-pgd"},
        {"certified_radii": np.full(23, 0.11)}, {"seed": 1}, {"batch_size": 7}, {"audit": True}, {"threads": 2},
        {"indices": np.arange(1, 24)}, {"identity": "another"}, {"shard_size": 12}, {"eight_bit": True},
    ]
    for change in changes:
        model.calls.clear()
        if "eight_bit" in change:
            change["images"] = (images * 255).round() / 255
        sharded_sweep(model, **call | change)
        assert model.calls, change
    kept = len(list(tmp_path.iterdir()))
    assert kept == len(changes) + 2, "no file of other options is touched"
    for change in changes:  # each finds its own again
        model.calls.clear()
        sharded_sweep(model, **call | change)
        assert not model.calls, change
    longer = torch.cat([images, torch.rand(4, 1, 8, 8)])
    model.calls.clear()
    more = {"images": longer, "labels": torch.cat([labels, labels[:4]]), "certified_radii": np.full(27, 0.07)}
    sharded_sweep(model, **call | more)
    assert model.calls[0][0] == 4, "more images reuse the shards that stay the same"


def test_the_identity_of_a_model() -> None:
    model, _, _ = toy()
    reference = model_identity(model, None)
    assert model_identity(toy()[0], None) == reference
    changed: list[Callable[[Counting], Any]] = [
        lambda m: m.get_parameter("net.1.weight").data[0, 0].add_(1e-6), lambda m: setattr(m, "offset", 0.1),
        lambda m: m.net.append(nn.Identity()), lambda m: m.double(),
        lambda m: m.register_buffer("extra", torch.ones(1), persistent=False),
    ]
    for change in changed:
        other = toy()[0]
        change(other)
        assert model_identity(other, None) != reference
    assert model_identity(model, "2") != model_identity(model, "1")
    for wrong, line in ((lambda x: x, "pass identity="), (model.forward, "pass identity=")):
        with pytest.raises(AttackInputError, match=line):
            model_identity(wrong, None)
    with pytest.raises(AttackInputError, match="must be a string"):
        model_identity(model, 7)  # type: ignore[arg-type]


def test_a_callable_needs_a_name_and_resumes_by_it(tmp_path: Path) -> None:
    model, images, labels = toy()
    with pytest.raises(AttackInputError, match="pass identity="):
        sharded_sweep(lambda x: model(x), images, labels, GRID, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    first = sharded_sweep(lambda x: model(x), images, labels, GRID, folder=tmp_path, identity="toy 1")
    model.calls.clear()
    assert same(sharded_sweep(lambda x: model(x), images, labels, GRID, folder=tmp_path, identity="toy 1"), first)
    assert not model.calls


def test_every_shard_has_the_same_number_of_threads(tmp_path: Path) -> None:
    model, images, labels = toy()
    torch.set_num_threads(3)
    try:
        sharded_sweep(model, images, labels, [0.1], "l2pgd", folder=tmp_path, shard_size=12)
        assert {threads for _, threads in model.calls[1:]} == {1}  # the first call is toy's own
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_progress_counts_forward_passes(tmp_path: Path) -> None:
    model, images, labels = toy()
    seen: list[tuple[str, int, int]] = []
    options: dict[str, Any] = {"folder": tmp_path, "shard_size": 9, "progress": lambda *news: seen.append(news)}
    result = sharded_sweep(model, images, labels, GRID, **options)
    total = sum(result.forward_passes.values())
    assert seen[0] == ("0 of 3 shards done before", 0, 23 * expected_passes("standard", GRID))
    assert seen[-1][1:] == (total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    parts = [
        sum(sweep(model, images[k], labels[k], GRID, indices=np.arange(23)[k]).forward_passes.values())
        for k in (slice(0, 9), slice(9, 18), slice(18, 23))
    ]
    after_first = next(news for news in seen if news[0] == "shard 1 of 3 done")
    assert after_first[1:] == (parts[0], int(np.ceil(parts[0] / 9 * 23)))
    sorted(tmp_path.iterdir())[1].unlink()
    seen.clear()
    sharded_sweep(model, images, labels, GRID, **options)
    known = parts[0] + parts[2]
    assert seen[0] == ("2 of 3 shards done before", known, int(np.ceil(known + known / 14 * 9)))
    assert seen[-1][1:] == (total, total)


def test_half_written_files_of_the_dead_are_removed(tmp_path: Path) -> None:
    model, images, labels = toy()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    names = {pid: tmp_path / f".00000-abc.safetensors.{host}-{pid}.partial" for pid in (dead.pid, os.getppid())}
    elsewhere = tmp_path / f".00000-abc.safetensors.another-{host}-{dead.pid}.partial"
    for path in (*names.values(), elsewhere):
        path.write_bytes(b"half")
    sharded_sweep(model, images, labels, [0.1], "l2pgd", folder=tmp_path)
    assert not names[dead.pid].exists()
    assert names[os.getppid()].exists(), "the process that writes it is alive"
    assert elsewhere.exists(), "whether it is alive is known on its machine only"


def test_warnings_of_many_shards_are_said_once() -> None:
    flat = "flat logits (median gap of the two largest logits: {}); believe the set 'standard' instead"
    assert _agreed([[flat.format(0.3)]]) == [flat.format(0.3)]
    assert _agreed([["plain", "plain"], ["plain"]]) == ["plain"]
    assert _agreed([[flat.format("0.3")], ["plain"], [flat.format("4.1e-05")]]) == [
        flat.format(0.3) + " (so in 2 of 3 shards; the numbers are of the first)",
        "plain (so in 1 of 3 shards; the numbers are of the first)",
    ]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"shard_size": 0}, "shard_size must be a positive integer"), ({"threads": True}, "threads must be"),
        ({"executor": "cloud"}, "unknown executor 'cloud'"), ({"folder": "/proc/none"}, "cannot make the folder"),
        ({"images": torch.rand(0, 1, 8, 8)}, "nothing to attack"), ({"labels": [1]}, "labels must have shape"),
        ({"epsilons": [0.1, 0.1]}, "more than once"), ({"attacks": "magic"}, "unknown attack"),
        ({"certified_radii": [1.0]}, "certified_radii must have shape"), ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_input_is_one_line(change: dict[str, Any], line: str, tmp_path: Path) -> None:
    model, images, labels = toy(3)
    call: dict[str, Any] = {"images": images, "labels": labels, "epsilons": GRID, "folder": tmp_path} | change
    with pytest.raises(AttackInputError, match=line) as caught:
        sharded_sweep(model, **call)
    assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="unexpected keyword argument 'epsilon'"):
        sharded_sweep(model, images, labels, GRID, folder=tmp_path, epsilon=1)


def test_workers_find_what_one_process_finds_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parametrised model, an attack of the caller's own, and a worker killed in the middle."""
    (tmp_path / "own_attack_for_test.py").write_text(
        "import torch\nfrom attacks import Attack\n"
        "class Fade(Attack):\n"
        "    name, kind, loss, cost, good_at = 'fade-test', 'minimum-norm', 'none', 0, 'fading'\n"
        "    def propose(self, problem):\n"
        "        return [problem.images * (1 - k / 50) for k in range(1, 40)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import own_attack_for_test  # type: ignore[import-not-found]

    monkeypatch.setitem(ATTACKS, "fade-test", own_attack_for_test.Fade())
    torch.manual_seed(0)
    layer = parametrizations.orthogonal(nn.Linear(64, 64))
    model = nn.Sequential(nn.Flatten(), layer, nn.ReLU(), nn.Linear(64, 10)).eval()
    images = torch.rand(40, 1, 8, 8)
    labels = model(images).argmax(dim=1)
    killed: list[int] = []

    def kill_one(text: str, done: int, total: int) -> None:
        if not killed and (children := multiprocessing.active_children()) and done:
            killed.append(len(list(tmp_path.glob("workers/*"))))
            children[0].kill()

    one, two = (
        sharded_sweep(model, images, labels, GRID, "fade-test,standard", folder=tmp_path / executor, shard_size=5,
                      executor=executor, workers=2, progress=kill_one)
        for executor in ("serial", "workers")
    )
    assert killed
    assert killed[0] < 8, "it was not in the middle"
    assert same(one, two)
    assert one.forward_passes["fade-test"] > 40
    names = [sorted(path.name for path in (tmp_path / executor).iterdir()) for executor in ("serial", "workers")]
    assert names[0] == names[1]
    assert torch.equal(model(images).argmax(dim=1), labels), "the caller's model stays as it was"
    assert is_parametrized(layer)
