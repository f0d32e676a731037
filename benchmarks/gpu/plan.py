"""What `make gpu` runs, as data: time limits, shapes in order of importance, tests, and the tiny twin for machines without."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from benchmarks.cases.shapes import SequenceShape, Shape

TOTAL_SECONDS = 525.0  # of the nine minutes; the rest is for writing the report and for what starts and ends around it
BROKEN = 3  # exit status of a part that an error took the device from


@dataclass(frozen=True)
class Phase:
    """One subprocess. seconds: when it is killed, unless less than that is left. module: run as python -m module.

    takes_rest: it may use whatever the phases before it left over.
    """

    name: str
    seconds: float
    takes_rest: bool = False


@dataclass(frozen=True)
class Plan:
    """One way to run everything.

    backends: row kernels under test, the default one last. headline: where the targets are. shapes: most important first.
    hidden: H of the fused head at the headline's N and V. case_seconds: timed for so long, twice. flush_bytes: written
    before every timed call, so that it finds a cold cache and a filled queue. sanitizers: tools of compute-sanitizer; none:
    the kernels' script runs without it.
    """

    name: str
    device: str
    backends: tuple[str, ...]
    headline: Shape
    shapes: tuple[Shape, ...]
    hidden: int
    sequences: SequenceShape
    small: SequenceShape
    case_seconds: float
    repeats: tuple[int, int]
    flush_bytes: int
    total_seconds: float
    phases: tuple[Phase, ...]
    tests: tuple[str, ...]
    test_workers: int
    sanitizers: tuple[str, ...]
    builds: bool

    @property
    def dry(self) -> bool:
        """Whether it says nothing of a GPU."""
        return self.device == "cpu"


VOCABULARIES = (151936, 128256, 262144, 49152, 32000)
ROWS = (8192, 1024, 32768, 64, 1)
DTYPES = ("bfloat16", "float32")
HEADLINE = Shape(8192, 151936, "bfloat16")


def by_importance() -> tuple[Shape, ...]:
    """Every shape but the headline: bf16 before fp32, full chips before near-empty ones, Qwen's vocabulary first."""
    grid = (Shape(n, v, d) for d, n, v in itertools.product(DTYPES, ROWS, VOCABULARIES))
    return tuple(s for s in grid if s != HEADLINE)


# The package's own tests of everything that has a GPU kernel, on CUDA tensors (VCPO_TEST_DEVICE), and the GPU's own.
TESTS = (
    "tests/gpu",
    "tests/rows/test_token_stats.py",
    "tests/rows/test_score_rows.py",
    "tests/rows/test_weighted_logp.py",
    "tests/head/test_linear_token_stats.py",
    "tests/head/test_linear_weighted_logp.py",
    "tests/sequences/test_segments.py",
    "tests/sequences/test_segment_sum.py",
    "tests/sequences/test_vcpo.py",
    "tests/sequences/test_vcpo_coefficients.py",
    "tests/sequences/test_vcpo_degenerate.py",
    "tests/sequence_gradients/test_outer_sqnorm.py",
    "tests/backends/triton",
)

GPU = Plan(
    name="gpu",
    device="cuda",
    backends=("cuda", "triton"),
    headline=HEADLINE,
    shapes=by_importance(),
    hidden=4096,
    sequences=SequenceShape(batch=512, length=128, group=8),
    small=SequenceShape(batch=8, length=8, group=4),
    case_seconds=0.12,
    repeats=(5, 100),
    flush_bytes=512 << 20,  # ten times an H100's L2, and 0.3 ms in which the host gets ahead of the device
    total_seconds=TOTAL_SECONDS,
    phases=(
        Phase("environment", 25),
        Phase("build", 160),
        Phase("tests", 130),
        Phase("sanitizer", 60),
        Phase("headline", 60),
        Phase("peers", 45),
        Phase("shapes", 45, takes_rest=True),
    ),
    tests=TESTS,
    test_workers=6,
    sanitizers=("memcheck", "racecheck", "synccheck"),
    builds=True,
)

# The same harness at sizes that say nothing, on the CPU's backends: it shows that the harness works, and no more.
DRY = replace(
    GPU,
    name="dry run",
    device="cpu",
    backends=("reference", "native"),
    headline=Shape(8, 500, "bfloat16"),
    shapes=(Shape(4, 300, "float32"), Shape(1, 300, "bfloat16")),
    hidden=16,
    sequences=SequenceShape(batch=8, length=4, group=4),
    small=SequenceShape(batch=4, length=2, group=2),
    case_seconds=0.0,
    repeats=(2, 2),
    flush_bytes=1 << 16,
    total_seconds=300.0,
    phases=tuple(replace(p, seconds=60) for p in GPU.phases),
    tests=("tests/gpu",),
    test_workers=0,
    sanitizers=(),
    builds=False,
)

PLANS = {plan.name: plan for plan in (GPU, DRY)}
