"""What this package's own work is of a step on thousands of GPUs: computed from counted bytes and launches, not measured.

Every number that enters is in the tables below; nothing here has run at that size.
"""

from __future__ import annotations

from dataclasses import dataclass

MICRO = 1e-6


@dataclass(frozen=True)
class Machine:
    """One GPU and its links. flops: bf16, at the fraction that training reaches. Bytes a second. latency: of a collective, for
    each doubling of its ranks. launch: of a kernel.
    """

    name: str
    flops: float
    memory: float
    inside: float  # a node's links, for tensor and sequence ranks up to 8
    across: float  # the network's, for data ranks
    latency: float
    launch: float


H100 = Machine("H100 SXM, 8 a node, 400 Gb/s a GPU", 989e12 * 0.4, 3.35e12 * 0.8, 300e9, 40e9, 10 * MICRO, 5 * MICRO)


@dataclass(frozen=True)
class Job:
    """active: parameters that a token meets. tokens: of the step, all ranks. sequences: of the step."""

    name: str
    active: float
    hidden: int
    layers: int
    vocabulary: int
    data: int
    sequence: int
    tensor: int
    length: int
    sequences: int

    @property
    def ranks(self) -> int:
        """A rank a GPU: dp x cp x tp."""
        return self.data * self.sequence * self.tensor

    @property
    def tokens_a_rank(self) -> float:
        """N of the row kernels: tensor ranks share them."""
        return self.sequences * self.length / (self.data * self.sequence)


JOBS = (
    Job("8B", 8e9, 4096, 32, 128_256, 512, 1, 1, 8_192, 8_192),
    Job("70B", 70e9, 8192, 80, 128_256, 512, 1, 8, 8_192, 8_192),
    Job("400B mixture, 17B active", 17e9, 5120, 48, 202_048, 512, 1, 8, 16_384, 8_192),
    Job("70B, long", 70e9, 8192, 80, 128_256, 512, 8, 8, 131_072, 4_096),
)

TOKEN_BYTES = 20  # over vocabulary ranks: docs/parallel.md
SEQUENCE_BYTES, DATA_BYTES = 48, 64  # a sequence
LAUNCHES = 150  # of the sequence-sized arithmetic of one vcpo_loss over ranks, eager


def step_seconds(job: Job, machine: Machine) -> float:
    """Forward and backward of the model: 6 operations a parameter and token, and attention's 6 L H T / 2 a token (causal)."""
    attention = 6 * job.layers * job.hidden * job.length
    return job.sequences * job.length * (6 * job.active + attention) / (job.ranks * machine.flops)


def _collective(received: float, ranks: int, bandwidth: float, machine: Machine) -> float:
    """A ring's: what a rank receives, and the latency of its doublings."""
    return 0.0 if ranks == 1 else received / bandwidth + machine.latency * (ranks - 1).bit_length()


def parts(job: Job, machine: Machine) -> dict[str, float]:
    """Seconds a step, one micro-batch a rank. The pass over logits is that of the head's "fast", which reads what its GEMM
    wrote and writes the scores over it.
    """
    mine = job.sequences / job.data
    logits = job.tokens_a_rank * job.vocabulary / job.tensor * 2
    states = _collective(job.tokens_a_rank * TOKEN_BYTES * (job.tensor - 1), job.tensor, machine.inside, machine)
    sums = _collective(2 * mine * SEQUENCE_BYTES, job.sequence, machine.inside, machine)
    rows = _collective(job.sequences * DATA_BYTES, job.data, machine.across, machine)
    return {
        "pass over logits": 2 * logits / machine.memory,
        "states over vocabulary ranks": states,
        "sums over sequence ranks": sums,
        "gather over data ranks": rows,
        "arithmetic of the step's sequences": LAUNCHES * machine.launch,
    }


def tables() -> dict[str, str]:
    """The page's table."""
    names = list(parts(JOBS[0], H100))
    lines = [
        f"| job | GPUs (dp x cp x tp) | step | {' | '.join(names)} |",
        f"|---|---|---:|{'---:|' * len(names)}",
    ]
    for job in JOBS:
        step = step_seconds(job, H100)
        shares = [f"{seconds * 1e3:.2g} ms, {seconds / step:.2%}" for seconds in parts(job, H100).values()]
        shape = f"{job.ranks} ({job.data} x {job.sequence} x {job.tensor})"
        of = f"{job.name}, {job.sequences} sequences of {job.length // 1024}k"
        lines.append(f"| {of} | {shape} | {step:.3g} s | {' | '.join(shares)} |")
    return {"scale_plan": "\n".join(lines) + f"\n\n{_assumptions(H100)}\n"}


def _assumptions(m: Machine) -> str:
    return (
        f"Computed, not measured, for {m.name}: {m.flops / 1e12:.0f} TFLOP/s of bf16 as training reaches them, memory at "
        f"{m.memory / 1e12:.2f} TB/s, links at {m.inside / 1e9:.0f} GB/s inside a node and {m.across / 1e9:.0f} across, "
        f"{m.latency / MICRO:.0f} us a doubling of ranks for a collective, {m.launch / MICRO:.0f} us a kernel. A step is "
        "6 operations a parameter and token and causal attention; optimizer, recomputation and the model's own collectives "
        "would make it longer, and every share smaller."
    )
