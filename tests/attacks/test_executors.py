"""Executors: the same outcomes wherever a piece runs, and clear lines when a worker cannot."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attacks import AttackInputError
from attacks.executors import Job, _guarded, _outcome, execute

PIECES = '''
import os, signal
import torch
from attacks import AttackInputError

arrived = 0

class Context:
    """Counts how often it was sent to this process."""
    def __init__(self, weight, folder):
        self.weight, self.folder = weight, folder
    def __getstate__(self):
        return self.__dict__.copy()
    def __setstate__(self, state):
        global arrived
        arrived += 1
        self.__dict__.update(state)

def scale(context, argument, tick):
    tick(len(argument), "scaling")
    return context.weight * argument, os.getpid(), arrived

def die_once(context, argument, tick):
    flag = os.path.join(context.folder, "died")
    if argument[0] == 1 and not os.path.exists(flag):
        open(flag, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return scale(context, argument, tick)

def die(context, argument, tick):
    os._exit(7)

def refuse(context, argument, tick):
    raise AttackInputError("cannot attack this")

def fail(context, argument, tick):
    raise ZeroDivisionError("a bug")
'''


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A module that workers can import, which they cannot where a test file is concerned."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "pieces_for_test.py").write_text(PIECES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import pieces_for_test  # type: ignore[import-not-found]

        yield pieces_for_test


def job(function: Callable[..., Any], context: Any, count: int = 4, seen: list[Any] | None = None) -> Job:
    seen = [] if seen is None else seen
    return Job(
        function, context, list(range(count)), lambda number: torch.full((2,), float(number)),
        lambda *news: seen.append(news),
    )


def test_workers_give_what_serial_gives_though_one_is_killed(pieces: Any, tmp_path: Path) -> None:
    weight = torch.tensor([2.0, 3.0])
    expected = dict(execute(job(pieces.scale, pieces.Context(weight, str(tmp_path))), "serial"))
    seen: list[Any] = []
    running = execute(job(pieces.die_once, pieces.Context(weight, str(tmp_path)), seen=seen), "workers", 2)
    found = dict(running)
    assert (tmp_path / "died").exists(), "no worker was killed"
    assert {n: o[0].tolist() for n, o in found.items()} == {n: o[0].tolist() for n, o in expected.items()}
    processes = {outcome[1] for outcome in found.values()}
    assert os.getpid() not in processes
    assert len(processes) >= 2
    assert {outcome[2] for outcome in found.values()} == {1}, "the context is sent once a worker, not once a piece"
    assert (0, 2, "scaling") in seen
    assert (1, 0, "again, after a worker died") in seen
    assert not weight.is_shared(), "sending moved the caller's weights"
    assert not multiprocessing.active_children()


def test_a_piece_that_kills_two_workers_is_one_line(pieces: Any) -> None:
    with pytest.raises(AttackInputError, match=r"^2 worker processes died on piece 0, the last with exit code 7 .*$"):
        list(execute(job(pieces.die, None, 1), "workers", 1))
    assert not multiprocessing.active_children()


def test_errors_of_a_piece_come_back(pieces: Any) -> None:
    for error, from_worker in ((AttackInputError, AttackInputError), (ZeroDivisionError, RuntimeError)):
        piece = pieces.refuse if error is AttackInputError else pieces.fail
        with pytest.raises(error):
            list(execute(job(piece, None), "serial"))
        with pytest.raises(from_worker, match=r"^cannot attack this$|(?s:piece 5 failed in a worker.*: a bug)"):
            _outcome(5, *_guarded(lambda piece=piece: piece(None, None, None)))  # type: ignore[misc]
    with pytest.raises(RuntimeError, match=r"(?s)piece 0 failed in a worker.*in fail.*ZeroDivisionError: a bug"):
        list(execute(job(pieces.fail, None, 1), "workers", 1))


@pytest.mark.parametrize(
    ("executor", "workers", "context", "line"),
    [
        ("threads", None, None, "unknown executor 'threads'; there are: serial, workers, ray"),
        ("workers", 0, None, "workers must be a positive integer, got 0"),
        ("serial", 2.5, None, "workers must be a positive integer, got 2.5"),
        ("workers", 1, lambda: None, "cannot be sent to worker processes"),
    ],
)
def test_what_cannot_run_is_one_line(executor: str, workers: Any, context: Any, line: str) -> None:
    with pytest.raises(AttackInputError, match=line) as caught:
        list(execute(job(print, context, 1), executor, workers))
    assert "\n" not in str(caught.value)


def test_without_ray_the_line_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(AttackInputError, match=r"pip install 'robustflow\[ray\]'"):
        list(execute(job(print, None), "ray"))


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(sign: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C (which a terminal sends to the whole group) and SIGKILL of the parent, in the middle of a piece."""
    script = tmp_path / "endless.py"
    script.write_text(textwrap.dedent("""
        import os, signal, time
        from attacks.executors import Job, execute

        def endless(context, argument, tick):
            tick(os.getpid(), "running")
            time.sleep(1000)

        def report(number, done, text):
            print(done, flush=True)

        if __name__ == "__main__":
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
            list(execute(Job(endless, None, [0], lambda number: None, report), "workers", 1))
    """))
    command = [sys.executable, str(script)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        worker = int(process.stdout.readline())
        assert alive(worker)
        try:
            if sign is signal.SIGINT:
                os.killpg(process.pid, sign)
            else:
                process.kill()
            process.wait(timeout=60)
        finally:
            process.kill()
        errors = process.stderr.read()  # ends when the last process that could write to it has ended
    deadline = time.monotonic() + 60
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)
    if sign is signal.SIGINT:
        assert errors.count("KeyboardInterrupt") == 1, "of the parent alone"
