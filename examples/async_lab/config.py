"""What a run is and what it leaves behind: a configuration in, one JSON file out."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .methods import METHODS
from .tasks import TASKS


def _one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}; got {value!r}.")


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number > 0; got {value!r}.")


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervision before RL: AdamW on `batch` fresh examples a step until sampled accuracy is `target`.

    One checkpoint serves every run of a task, as one supervised model would; `seed` is its own.
    """

    task: str = "sort"
    target: float = 0.5
    rate: float = 1e-3
    batch: int = 64
    max_steps: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("task", self.task, tuple(TASKS))
        _positive("target", self.target)
        _positive("rate", self.rate)
        for name, least in (("batch", 1), ("max_steps", 0), ("seed", 0)):
            _whole(name, getattr(self, name), least)

    @property
    def filename(self) -> str:
        """A name of its own for every configuration."""
        return f"warm-start-{self.task}-{_digest(asdict(self))}.pt"


@dataclass(frozen=True)
class RunConfig:
    """One training run.

    method, task: names in `METHODS` and `TASKS`. lag: k; the rollouts of step t come from the parameters
    after max(0, t - k) steps. rate: AdamW's learning rate, constant. seed: prompts and samples of the run.
    prompts, samples: prompts a step and responses to each. clip: largest gradient norm. temperature: of
    sampling, training and evaluation. eval_every, eval_prompts: how often, and on how many held-out prompts,
    accuracy is taken.
    """

    method: str = "vcpo"
    lag: int = 32
    rate: float = 1e-3
    seed: int = 0
    steps: int = 400
    task: str = "sort"
    prompts: int = 8
    samples: int = 8
    clip: float = 1.0
    temperature: float = 1.0
    eval_every: int = 10
    eval_prompts: int = 128
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)

    def __post_init__(self) -> None:
        _one_of("method", self.method, tuple(METHODS))
        _one_of("task", self.task, tuple(TASKS))
        for name in ("rate", "clip", "temperature"):
            _positive(name, getattr(self, name))
        least = {
            "lag": 0,
            "seed": 0,
            "steps": 1,
            "prompts": 1,
            "samples": 2,
            "eval_every": 1,
            "eval_prompts": 1,
        }
        for name, minimum in least.items():
            _whole(name, getattr(self, name), minimum)
        if self.warm_start.task != self.task:
            raise ValueError(f"warm_start.task must be the run's task {self.task!r}; got {self.warm_start.task!r}.")

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits, different for every configuration."""
        return _digest(asdict(self))

    @property
    def filename(self) -> str:
        """Readable, and different for every configuration: what is not in the name is in its digest."""
        return f"{self.task}-{self.method}-lag{self.lag}-rate{self.rate:g}-seed{self.seed}-{self.digest}.json"

    @property
    def shape(self) -> RunConfig:
        """What runs that one trainer takes together have in common."""
        return replace(self, method="none", rate=1.0, seed=0, clip=1.0)


# A task's warm start, where it is not the default one. Of sums, 30% right leave RL something to do.
WARM_STARTS: dict[str, WarmStartConfig] = {"add": WarmStartConfig("add", target=0.3)}


def warm_start_of(task: str) -> WarmStartConfig:
    """The warm start that the commands use for a task."""
    return WARM_STARTS.get(task, WarmStartConfig(task))


FINAL_EVALS = 5
SERIES = ("reward", "ess_ratio", "grad_norm", "rate_scale")  # of a step, in the order of `RunResult`


@dataclass
class RunResult:
    """Curves and figures of a finished run.

    eval_steps, accuracy: held-out accuracy of sampled responses (not greedy) after so many learner steps, 0
    included. reward, ess_ratio, grad_norm, rate_scale: one value an evaluation but the first, the mean over the
    learner steps since the one before: reward of the rollouts trained on, ESS / B of their untruncated sequence
    weights, gradient norm before clipping, and the factor on the learning rate. final_accuracy: mean of the last
    five evaluations. best_accuracy: the highest one. seconds: wall-clock time; of runs that were trained together,
    each one's share. backend: which backend of vcpo_kernels served the rows; curves of different ones drift apart
    in the last digits. Figures are rounded as they come, to what the JSON and CSV files hold.
    """

    config: RunConfig
    eval_steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    ess_ratio: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    rate_scale: list[float] = field(default_factory=list)
    final_accuracy: float = math.nan
    best_accuracy: float = math.nan
    seconds: float = math.nan
    backend: str = ""

    def add(self, step: int, accuracy: float, figures: Sequence[dict[str, float]] = ()) -> None:
        """An evaluation after `step` steps, and the figures of each step since the last one (none at step 0)."""
        self.eval_steps.append(step)
        self.accuracy.append(round(accuracy, 4))
        for name in SERIES if figures else ():
            getattr(self, name).append(float(f"{sum(f[name] for f in figures) / len(figures):.3g}"))

    def finish(self, backend: str, seconds: float) -> RunResult:
        """Fill in what follows from the curves; self."""
        last = self.accuracy[-FINAL_EVALS:]
        self.final_accuracy = round(sum(last) / len(last), 4)
        self.best_accuracy = max(self.accuracy)
        self.backend, self.seconds = backend, round(seconds, 1)
        return self

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> RunResult:
        """The inverse of `to_json`. Raises ValueError where the text is no run's result."""
        try:
            record = json.loads(text)
            config = record.pop("config")
            warm_start = WarmStartConfig(**config.pop("warm_start"))
            return RunResult(config=RunConfig(warm_start=warm_start, **config), **record)
        except (TypeError, KeyError, AttributeError) as error:
            expected = ", ".join(f.name for f in fields(RunResult))
            raise ValueError(f"a run's result must be a JSON object of {expected}; {error}.") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, so that whatever exists was finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def load_result(config: RunConfig, folder: Path) -> RunResult | None:
    """The run's result if it has finished before, else None."""
    path = folder / config.filename
    return RunResult.from_json(path.read_text()) if path.exists() else None


def all_results(folder: Path) -> list[RunResult]:
    """Every finished run in a folder."""
    runs = [RunResult.from_json(path.read_text()) for path in folder.glob("*-lag*-rate*-seed*.json")]
    return sorted(runs, key=lambda r: r.config.filename)


def save_result(result: RunResult, folder: Path) -> None:
    """Write the run's JSON file."""
    write_atomically(folder / result.config.filename, result.to_json().encode())
