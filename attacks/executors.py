"""Where pieces of work run: in this process, in local worker processes, or on a Ray cluster.

All three call the same function with the same arguments, so what comes out does not depend on where it ran.
"""

from __future__ import annotations

import io
import os
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection, get_context, parent_process, resource_tracker
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from attacks.victim import AttackInputError

EXECUTORS = ("serial", "workers", "ray")
TRIES = 2  # a piece of work is given to a second worker if the first dies, then to nobody

Tick = Callable[[int, str], None]  # how far a piece is, and what it is doing


@dataclass(frozen=True)
class Job:
    """``function(context, argument(number), tick)`` for every number.

    ``function`` is a module's own function, ``context`` is sent once to every worker. ``tick(number, done, text)``
    hears of progress inside a piece (not from Ray). ``threads`` is what a piece takes of a Ray node.
    """

    function: Callable[[Any, Any, Tick], Any]
    context: Any
    numbers: Sequence[int]
    argument: Callable[[int], Any]
    tick: Callable[[int, int, str], None]
    threads: int = 1
    cuda: bool = False


def execute(job: Job, executor: str = "serial", workers: int | None = None) -> Generator[tuple[int, Any]]:
    """(number, outcome) of every piece, in the order in which they end. Close the iterator to stop the rest.

    ``workers``: processes (default: one a core of this process), on Ray pieces at a time (default: its CPUs).
    Errors: AttackInputError, one line, for an unknown executor, a missing Ray, a context that cannot be sent, a
    worker that dies twice on the same piece, and whatever AttackInputError a piece raises. Other exceptions of a
    piece come as they are from "serial", and as RuntimeError with the worker's traceback from the others.

    >>> def double(context, number, tick):
    ...     return context * number
    >>> list(execute(Job(double, 2, [3, 4], lambda number: number, lambda *_: None)))
    [(3, 6), (4, 8)]
    """
    if executor not in EXECUTORS:
        raise AttackInputError(f"unknown executor {executor!r}; there are: {', '.join(EXECUTORS)}")
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise AttackInputError(f"workers must be a positive integer, got {workers!r}")
    if executor == "serial" or not job.numbers:
        return _serial(job)
    return _workers(job, workers or _cores()) if executor == "workers" else _ray(job, workers)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serial(job: Job) -> Generator[tuple[int, Any]]:
    for number in job.numbers:
        yield number, job.function(job.context, job.argument(number), partial(job.tick, number))


def _guarded(job_part: Callable[[], Any]) -> tuple[str, Any]:
    """("done", outcome), ("refused", line) or ("failed", traceback)."""
    try:
        return "done", job_part()
    except AttackInputError as error:
        return "refused", str(error)
    except Exception:
        return "failed", traceback.format_exc()


def _outcome(number: int, kind: str, value: Any) -> Any:
    if kind == "refused":
        raise AttackInputError(value)
    if kind == "failed":
        raise RuntimeError(f"piece {number} failed in a worker:\n{value}")
    return value


class _ByValue(ForkingPickler):
    """What multiprocessing sends, tensors included as plain bytes.

    torch's own way is shared memory, which moves the caller's weights there, is 64 MB small in a container, and is
    gone with the process that made it.
    """

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (Tensor, torch.UntypedStorage, torch.TypedStorage)):
            return obj.__reduce_ex__(4)
        return NotImplemented


def _pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    _ByValue(buffer, 4).dump(value)
    return buffer.getvalue()


class _Worker:
    """A process that waits for pieces; it dies with this one."""

    def __init__(self) -> None:
        spawn = get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.ready = False
        self.process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
        # Ctrl-C reaches the whole group: the parent alone decides. Masked from the worker's first instruction on;
        # the tracker is started before, because starting it lifts the mask.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def send(self, message: bytes) -> None:
        with suppress(OSError):  # it is dead: whoever listens to it will hear so
            self.pipe.send_bytes(message)

    def receive(self) -> tuple[str, Any] | None:
        """Its next message; None if it is dead."""
        try:
            return ForkingPickler.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            return None

    def stop(self) -> int | None:
        """Its exit code, after killing it if need be: it holds nothing that could be lost."""
        self.pipe.close()
        self.process.join(0.5)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        return self.process.exitcode


def _serve(pipe: connection.Connection) -> None:
    """A worker's life: the function and its context once, then piece after piece until the parent hangs up."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        kind, value = _guarded(lambda: ForkingPickler.loads(pipe.recv_bytes()))
        pipe.send_bytes(_pack(("ready", None) if kind == "done" else (kind, value)))
        while kind == "done":
            argument = ForkingPickler.loads(pipe.recv_bytes())
            function, context = value
            outcome = _guarded(partial(function, context, argument, partial(_send_tick, pipe)))
            pipe.send_bytes(_pack(outcome))
    except (EOFError, OSError):
        return


def _send_tick(pipe: connection.Connection, done: int, text: str) -> None:
    pipe.send_bytes(_pack(("tick", (done, text))))


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _workers(job: Job, workers: int) -> Generator[tuple[int, Any]]:
    try:
        context = _pack((job.function, job.context))
    except Exception as error:
        raise AttackInputError(
            f"the model or an attack cannot be sent to worker processes ({' '.join(str(error).split())}): define its"
            " class in a module, or use executor='serial' or 'ray'"
        ) from error
    waiting, tries = deque(job.numbers), Counter[int]()
    busy: dict[_Worker, int] = {}

    def hire(crew: list[_Worker]) -> None:
        for worker in crew:  # all are starting by now: they read this side by side
            worker.send(context)
            assign(worker)

    def assign(worker: _Worker) -> None:
        if waiting:
            busy[worker] = waiting.popleft()
            tries[busy[worker]] += 1
            worker.send(_pack(job.argument(busy[worker])))

    crew: list[_Worker] = []
    try:
        crew += [_Worker() for _ in range(min(workers, len(waiting)))]
        hire(list(crew))
        while busy:
            waited = {worker.pipe: worker for worker in busy}
            for pipe in connection.wait(list(waited)):
                worker = waited[pipe]  # type: ignore[index]
                number, message = busy[worker], worker.receive()
                if message is None:
                    crew.remove(worker)
                    del busy[worker]
                    _mourn(worker.stop(), number, tries[number], worker.ready)
                    job.tick(number, 0, "again, after a worker died")
                    waiting.appendleft(number)
                    crew.append(_Worker())
                    hire(crew[-1:])
                elif message[0] == "ready":
                    worker.ready = True
                elif message[0] == "tick":
                    job.tick(number, *message[1])
                else:
                    outcome = _outcome(number, *message)
                    del busy[worker]
                    assign(worker)
                    yield number, outcome
    finally:
        for worker in crew:
            worker.pipe.close()
        for worker in crew:
            worker.stop()


def _mourn(code: int | None, number: int, tries: int, ready: bool) -> None:
    """One line if there is no use in trying again."""
    if tries < TRIES:
        return
    if not ready:
        raise AttackInputError(f"worker processes end with exit code {code} before they start to work: a script that"
                               ' uses them must be a file whose work is below `if __name__ == "__main__":`')
    raise AttackInputError(f"{TRIES} worker processes died on piece {number}, the last with exit code {code} (-9:"
                           " killed, as for want of memory): use fewer workers or a smaller batch_size; what is done"
                           " is kept")


def _on_ray(function: Callable[..., Any], context: Any, argument: Any) -> tuple[str, Any]:
    return _guarded(lambda: function(context, argument, lambda done, text: None))


def _ray(job: Job, workers: int | None) -> Generator[tuple[int, Any]]:
    try:
        import ray
    except ImportError:
        raise AttackInputError("executor 'ray' needs Ray, which is not installed: pip install 'robustflow[ray]'"
                               ) from None
    mine = not ray.is_initialized()
    if mine:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
        try:
            ray.init(address="auto", **quiet)
        except ConnectionError:
            ray.init(num_cpus=workers or _cores(), include_dashboard=False, **quiet)
    pending: dict[Any, int] = {}
    try:
        limit = workers or max(1, int(ray.cluster_resources().get("CPU", 1)) // job.threads)
        remote = ray.remote(num_cpus=job.threads, num_gpus=int(job.cuda), max_retries=TRIES - 1)(_on_ray)
        context, waiting = ray.put(job.context), deque(job.numbers)
        while waiting or pending:
            while waiting and len(pending) < limit:
                number = waiting.popleft()
                pending[remote.remote(job.function, context, job.argument(number))] = number
            (done,), _ = ray.wait(list(pending), num_returns=1)
            number = pending.pop(done)
            try:
                kind, value = ray.get(done)
            except ray.exceptions.RayError as error:
                line = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise AttackInputError(f"Ray gave up piece {number} after {TRIES} tries: {line}") from error
            yield number, _outcome(number, kind, value)
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)
        if mine:
            ray.shutdown()
