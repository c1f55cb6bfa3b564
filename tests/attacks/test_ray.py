"""The Ray executor on a local cluster of two nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attacks import AttackInputError, sharded_sweep
from attacks.executors import Job, execute

ray: Any = pytest.importorskip("ray", reason="Ray is not installed: pip install 'robustflow[ray]'")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each, and a connection to them."""
    from ray.cluster_utils import Cluster

    both = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        both.add_node(num_cpus=1)
        ray.init(address=both.address, logging_level="error", log_to_driver=False)
        yield both
    finally:
        ray.shutdown()
        both.shutdown()


def nodes_at_work() -> int:
    def where(context: int, argument: int, tick: Any) -> tuple[int, str]:
        import time

        import ray

        time.sleep(0.2)
        return context * argument, ray.get_runtime_context().get_node_id()

    found = dict(execute(Job(where, 3, [0, 1, 2, 3], lambda number: number, lambda *_: None), "ray"))
    assert {number: value for number, (value, _) in found.items()} == {0: 0, 1: 3, 2: 6, 3: 9}
    return len({node for _, node in found.values()})


def test_two_nodes_share_the_pieces(cluster: Any) -> None:
    assert nodes_at_work() == 2
    assert ray.is_initialized(), "a connection of the caller's stays open"


def test_two_nodes_find_what_one_process_finds_bit_for_bit(cluster: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    images = torch.rand(40, 1, 8, 8)
    labels = model(images).argmax(dim=1)
    labels[::9] = (labels[::9] + 1) % 10
    one, two = (
        sharded_sweep(model, images, labels, [0.05, 0.1, 0.2], folder=tmp_path / name, shard_size=7, executor=name)
        for name in ("serial", "ray")
    )
    assert two.samples.equals(one.samples)
    assert torch.equal(two.adversarials, one.adversarials)
    assert two.forward_passes == one.forward_passes
    assert len(set(one.samples["attack"])) > 2


def test_a_worker_killed_in_the_middle_changes_nothing(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = str(tmp_path / "died")

    def mortal(task: Any, part: Any, tick: Any) -> Any:
        import os
        import signal

        from attacks.shard_work import run_shard

        if part.places[0] == 8 and not os.path.exists(flag):
            open(flag, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return run_shard(task, part, tick)

    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), torch.rand(16, 1, 8, 8)
    labels = model(images).argmax(dim=1)
    one = sharded_sweep(model, images, labels, [0.1, 0.2], folder=tmp_path / "serial", shard_size=4)
    monkeypatch.setattr("attacks.shards.run_shard", mortal)
    two = sharded_sweep(model, images, labels, [0.1, 0.2], folder=tmp_path / "ray", shard_size=4, executor="ray")
    assert Path(flag).exists()
    assert two.samples.equals(one.samples)
    assert torch.equal(two.adversarials, one.adversarials)


def test_errors_come_back(cluster: Any) -> None:
    def refuse(context: int, argument: int, tick: Any) -> None:
        raise AttackInputError("cannot attack this")

    def die(context: int, argument: int, tick: Any) -> None:
        import os

        os._exit(7)

    with pytest.raises(AttackInputError, match=r"^cannot attack this$"):
        list(execute(Job(refuse, None, [0], lambda number: number, lambda *_: None), "ray"))
    with pytest.raises(AttackInputError, match=r"^Ray gave up piece 0 after 2 tries: ") as caught:
        list(execute(Job(die, None, [0], lambda number: number, lambda *_: None), "ray"))
    assert "\n" not in str(caught.value)


def test_a_running_cluster_is_joined(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Last, because it hangs up the connection of the tests above."""
    ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    assert nodes_at_work() == 2
    assert not ray.is_initialized(), "a connection of its own is closed"
