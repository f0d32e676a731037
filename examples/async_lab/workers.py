"""Runs on several processes, one thread each. Finished runs stay; Ctrl-C loses only what was running.

Workers are spawned, not forked: torch's thread pools do not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path

import torch

from .config import RunConfig, RunResult, WarmStartConfig, load_result, save_result
from .trainer import Stopped, train
from .warm_start import warm_model

PROGRESS_EVERY = 5  # steps
STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Message:
    """What a worker tells about a run, by number: progress, an error's traceback, or that it has finished."""

    run: int
    step: int = 0
    accuracy: float = 0.0
    ess_ratio: float = 0.0
    error: str | None = None
    finished: bool = False


@dataclass
class Outcome:
    """What came of a list of runs, by their number in it. interrupted: Ctrl-C ended it early."""

    results: dict[int, RunResult] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    interrupted: bool = False


def _work(tasks: Queue[tuple[int, RunConfig] | None], messages: Queue[Message], stop: Event, folder: Path) -> None:
    """A worker process: takes runs until there is none left or it is told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    quiet_single_thread()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def stopped() -> bool:
        return stop.is_set() or not parent.is_alive()  # nobody waits for the results of a killed program

    while not stopped() and (task := tasks.get()) is not None:
        run, config = task

        def progress(step: int, accuracy: float, ess_ratio: float, run: int = run) -> None:
            if step % PROGRESS_EVERY == 0:
                messages.put(Message(run, step, accuracy, ess_ratio))

        try:
            result = train(config, folder, progress, stopped)
            save_result(result, folder)
            messages.put(Message(run, config.steps, result.accuracy[-1], result.ess_ratio[-1], finished=True))
        except Stopped:
            return
        except Exception:
            messages.put(Message(run, error=traceback.format_exc()))


def quiet_single_thread() -> None:
    """One torch thread, as results depend on how many; no warning about the backend, on eleven tokens."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="vcpo_kernels: .* runs on the slow reference backend")


def prepare_warm_starts(configs: Iterable[WarmStartConfig], folder: Path) -> None:
    """Train the warm starts that `folder` lacks, before workers would each do it."""
    quiet_single_thread()
    for config in dict.fromkeys(configs):
        warm_model(config, folder)


def run_all(
    configs: list[RunConfig],
    folder: Path,
    workers: int,
    force: bool = False,
    on_message: Callable[[Message], None] = lambda message: None,
) -> Outcome:
    """Run what `folder` has no result of (with `force`: everything) on `workers` processes; all results.

    Warm starts must be there (`prepare_warm_starts`). on_message is called in this process. Ctrl-C is taken
    as a wish to stop: the workers end after their current step, and the outcome says so.
    """
    outcome = Outcome({} if force else finished_before(configs, folder))
    waiting = [i for i in range(len(configs)) if i not in outcome.results]
    if not waiting:
        return outcome
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the children's torch reads it when they import it
    context = multiprocessing.get_context("spawn")
    tasks: Queue[tuple[int, RunConfig] | None] = context.Queue()
    messages: Queue[Message] = context.Queue()
    stop = context.Event()
    workers = min(workers, len(waiting))
    for task in [*((i, configs[i]) for i in waiting), *[None] * workers]:
        tasks.put(task)
    arguments = (tasks, messages, stop, folder)
    processes = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(workers)]
    try:
        for process in processes:
            process.start()
        _collect(configs, waiting, folder, messages, processes, outcome, on_message)
    except KeyboardInterrupt:
        outcome.interrupted = True
    finally:
        stop.set()
        tasks.cancel_join_thread()  # runs that nobody took must not keep this process from ending
        for process in processes:
            process.join(STOP_SECONDS)
            if process.is_alive():
                process.terminate()
    return outcome


def finished_before(configs: list[RunConfig], folder: Path) -> dict[int, RunResult]:
    """The results that `folder` holds already."""
    loaded = {i: load_result(config, folder) for i, config in enumerate(configs)}
    return {i: result for i, result in loaded.items() if result is not None}


def _collect(
    configs: list[RunConfig],
    waiting: list[int],
    folder: Path,
    messages: Queue[Message],
    processes: list[SpawnProcess],
    outcome: Outcome,
    on_message: Callable[[Message], None],
) -> None:
    """Take messages until every waiting run has ended one way or another."""
    open_runs = set(waiting)
    while open_runs:
        message = _next_message(messages, processes)
        if message is None:
            outcome.errors |= dict.fromkeys(open_runs, "its worker process died (out of memory, or killed)")
            return
        if message.error is not None:
            outcome.errors[message.run] = message.error
        elif message.finished:
            path = folder / configs[message.run].filename
            outcome.results[message.run] = RunResult.from_json(path.read_text())
        if message.finished or message.error is not None:
            open_runs.discard(message.run)
        on_message(message)


def _next_message(messages: Queue[Message], processes: list[SpawnProcess]) -> Message | None:
    """The next message; None once no process is left that could send one."""
    while True:
        alive = any(process.is_alive() for process in processes)
        try:
            return messages.get(timeout=0.5)
        except queue.Empty:
            if not alive:
                return None
