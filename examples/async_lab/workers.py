"""Runs on several processes, one thread each, some at once in each. Finished runs stay; Ctrl-C loses what was running.

Workers are spawned, not forked: torch's thread pools do not survive a fork.
"""

from __future__ import annotations

import math
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
TOGETHER = 8  # runs; more save little, and are lost when a worker is stopped
# Freed memory is kept for the next step: otherwise glibc gives the larger tensors back to the system at every step, and each
# first touch of a page costs more than what is computed on it.
KEEP_MEMORY = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=1073741824"
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


Work = list[tuple[int, RunConfig]]  # runs, by number, that one trainer takes together


def _work(tasks: Queue[Work | None], messages: Queue[Message], stop: Event, folder: Path) -> None:
    """A worker process: takes runs until there is none left or it is told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    quiet_single_thread()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def stopped() -> bool:
        return stop.is_set() or not parent.is_alive()  # nobody waits for the results of a killed program

    while not stopped() and (work := tasks.get()) is not None:
        runs, configs = zip(*work, strict=True)

        def progress(step: int, accuracy: list[float], ess: list[float], runs: tuple[int, ...] = runs) -> None:
            if step % PROGRESS_EVERY == 0:
                for run, latest, ratio in zip(runs, accuracy, ess, strict=True):
                    messages.put(Message(run, step, latest, ratio))

        try:
            for run, result in zip(runs, train(configs, folder, progress, stopped), strict=True):
                save_result(result, folder)
                last = result.accuracy[-1], result.ess_ratio[-1]
                messages.put(Message(run, result.config.steps, *last, finished=True))
        except Stopped:
            return
        except Exception:
            for run in runs:
                messages.put(Message(run, error=traceback.format_exc()))


def together(configs: list[RunConfig], waiting: list[int], most: int) -> list[Work]:
    """Runs in the order given, those of one shape in pieces of at most `most`."""
    pieces: list[Work] = []
    open_piece: dict[RunConfig, Work] = {}
    for run in waiting:
        shape = configs[run].shape
        piece = open_piece.get(shape)
        if piece is None or len(piece) == most:
            pieces.append(piece := [])
            open_piece[shape] = piece
        piece.append((run, configs[run]))
    return pieces


def quiet_single_thread() -> None:
    """One torch thread, as results depend on how many; no warning about the backend, on a dozen tokens."""
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
    most: int = TOGETHER,
) -> Outcome:
    """Run what `folder` has no result of (with `force`: everything) on `workers` processes, `most` at once in each.

    Warm starts must be there (`prepare_warm_starts`). on_message is called in this process. Ctrl-C is taken
    as a wish to stop: the workers end after their current step, and the outcome says so.
    """
    outcome = Outcome({} if force else finished_before(configs, folder))
    waiting = [i for i in range(len(configs)) if i not in outcome.results]
    if not waiting:
        return outcome
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the children read these two as they start
    os.environ.setdefault("GLIBC_TUNABLES", KEEP_MEMORY)
    context = multiprocessing.get_context("spawn")
    tasks: Queue[Work | None] = context.Queue()
    messages: Queue[Message] = context.Queue()
    stop = context.Event()
    # Few runs are spread over all workers before any of them takes several.
    pieces = together(configs, waiting, max(1, min(most, math.ceil(len(waiting) / workers))))
    workers = min(workers, len(pieces))
    for task in [*pieces, *[None] * workers]:
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
