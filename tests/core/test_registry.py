"""Backend selection: what is forced is what runs, and where nothing can run the error says why, backend by
backend.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings

import pytest
import torch

import vcpo_kernels as vk
from vcpo_kernels.core import measured, registry

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def served_by(op: str = "token_stats", device: torch.device = CPU, dtype: torch.dtype = torch.float64) -> str:
    return registry.select(op, device, dtype).__name__.split(".")[-2]


@pytest.fixture
def broken_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """A native backend that is built wrong, whatever this machine has."""
    broken = dataclasses.replace(registry.BACKENDS["native"], probe=lambda: "it was built on the moon")
    monkeypatch.setitem(registry.BACKENDS, "native", broken)
    registry._warn_slow.cache_clear()


def test_float64_is_served_by_the_reference_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    """Only the reference takes float64 (gradcheck): choosing it is no accident to warn about."""
    assert served_by() == "reference"
    assert not recwarn


def test_contexts_nest_and_unwind_on_an_error() -> None:
    """The innermost one wins, and an exception inside leaves nothing forced behind."""
    with vk.use_backend("reference"):
        with vk.use_backend("triton"), vk.use_backend("reference"):
            assert registry._forced == ["reference", "triton", "reference"]
            assert served_by() == "reference"
        with vk.use_backend("triton"), pytest.raises(RuntimeError, match="no backend can serve"):
            served_by()
        with contextlib.suppress(KeyError), vk.use_backend("triton"):
            raise KeyError
        assert registry._forced == ["reference"]
    assert registry._forced == []


@pytest.mark.parametrize("name", ["cuda ", "Reference", "", None])
def test_unknown_backend(name: str) -> None:
    with pytest.raises(ValueError, match=r"use_backend: name must be one of 'reference', 'native', 'triton'.*got"):
        vk.use_backend(name).__enter__()


def test_forced_backend_without_the_op_leaves_it_to_the_default() -> None:
    """`use_backend("native")` around a whole step must work although native has not every op, nor each in every dtype."""
    with vk.use_backend("native"):
        assert served_by("outer_sqnorm", dtype=torch.float32) == "reference"
        assert served_by("segment_sum", dtype=torch.bfloat16) == "reference"
        assert served_by("segment_sum", dtype=torch.float64) == "native"


@pytest.mark.usefixtures("broken_native")
def test_the_fallback_warns_once_with_the_reason_and_forcing_it_does_not() -> None:
    """Slow without a word is what users call a hang; a warning per call is what they filter away."""
    with pytest.warns(
        UserWarning,
        match="token_stats runs on the slow reference backend, because native: it was built on the moon",
    ):
        assert served_by(dtype=torch.float32) == "reference"

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert served_by(dtype=torch.float32) == "reference"
        registry._warn_slow.cache_clear()
        with vk.use_backend("reference"):
            assert served_by(dtype=torch.float32) == "reference"
    registry._warn_slow.cache_clear()


OBJECTIONS = {
    "device": (("native", "token_stats", CUDA, torch.float32), "runs on cpu tensors, not on cuda"),
    "dtype": (("native", "token_stats", CPU, torch.float64), "does not take float64"),
    "op": (("native", "outer_sqnorm", CPU, torch.float32), "has no outer_sqnorm"),
    "triton on mps": (("triton", "token_stats", torch.device("mps"), torch.float32), "tensors, not on mps"),
}


@pytest.mark.parametrize("case", OBJECTIONS)
def test_objections_name_the_reason(case: str) -> None:
    question, reason = OBJECTIONS[case]
    assert any(reason in r for r in registry.objections(*question)), registry.objections(*question)


@pytest.mark.usefixtures("broken_native")
def test_objections_list_every_reason_and_probe_only_when_there_is_no_other() -> None:
    """A probe imports the backend: no reason to, for tensors that it could not take anyway."""
    assert registry.objections("native", "token_stats", CPU, torch.float32) == ["it was built on the moon"]
    assert registry.objections("native", "outer_sqnorm", CUDA, torch.float64) == [
        "has no outer_sqnorm",
        "runs on cpu tensors, not on cuda",
        "does not take float64",
    ]


@pytest.mark.usefixtures("broken_native")
def test_the_error_is_a_table_of_all_backends() -> None:
    with vk.use_backend("native"), pytest.raises(RuntimeError) as caught:
        vk.token_stats(torch.zeros(2, 4), torch.tensor([0, 1]))
    head, *rows = str(caught.value).splitlines()
    assert head == "token_stats: no backend can serve torch.float32 tensors on cpu (asked for: native)."
    assert [row.split(":")[0].strip() for row in rows] == list(registry.BACKENDS)
    assert rows[1] == "  native: it was built on the moon"


def test_triton_on_a_cpu_without_its_interpreter_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user without a GPU meets first: the error is a table of what there is, and why not."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with vk.use_backend("triton"), pytest.raises(RuntimeError) as caught:
        vk.token_stats(torch.zeros(2, 4), torch.tensor([0, 1]))
    head, *rows = str(caught.value).splitlines()
    assert head.endswith("(asked for: triton).")
    assert rows[0] == "  reference: can serve it"
    assert rows[1].startswith("  native: ")
    assert rows[2].startswith("  triton: runs on cpu tensors only under its interpreter: set TRITON_INTERPRET=1")


def test_the_reference_serves_everything_everywhere() -> None:
    """It is the last entry of every order, so that a missing extension is slow and never an error."""
    for op in registry.ROW_OPS | registry.SEQUENCE_OPS:
        for device in (CPU, CUDA, torch.device("mps"), torch.device("xpu")):
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                assert registry.objections("reference", op, device, dtype) == []
    for order in (*registry.ORDER.values(), registry.DEFAULT_ORDER):
        assert order[-1] == "reference"


def test_every_declared_op_has_its_module() -> None:
    """What a backend declares it must have, with the entry points that the ops call."""
    for backend in registry.BACKENDS.values():
        if backend.probe() is not None:
            continue
        for op in backend.ops:
            module = registry._load(backend.name, op)
            assert callable(module.forward), (backend.name, op)
            assert op != "token_stats" or callable(module.backward), (backend.name, op)


def test_forward_and_backward_use_the_backend_in_force_when_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As documented: loss.backward() outside the context is served by the default again."""
    seen = []
    real = registry.select

    def spy(op: str, *rest: object) -> object:
        seen.append((op, tuple(registry._forced)))
        return real(op, *rest)

    monkeypatch.setattr(registry, "select", spy)
    logits = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    with vk.use_backend("reference"):
        stats = vk.token_stats(logits, torch.tensor([0, 1]))
    stats.logp.sum().backward()
    assert [forced for op, forced in seen if op == "token_stats"] == [("reference",), ()]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """As on a machine with a GPU, as far as choosing goes: every probe content; the capability is the list's last."""
    for name in ("triton", "cuda"):
        monkeypatch.setitem(registry.BACKENDS, name, dataclasses.replace(registry.BACKENDS[name], probe=lambda: None))
    monkeypatch.setattr(registry, "_load", lambda name, op: f"{name}.{op}")
    capability = [(9, 0)]
    monkeypatch.setattr(registry, "capability", lambda device: capability[-1])
    return capability


def test_cuda_serves_only_what_it_was_measured_to_win(
    hopper: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton everywhere else: other widths, dtypes, ops and architectures, and where the width is not known."""
    wins = {(9, 0): (measured.Win("score_rows", "bfloat16", 100_000, 160_000),)}
    monkeypatch.setattr(measured, "MEASURED", wins)
    bf16 = torch.bfloat16
    assert registry.select("score_rows", CUDA, bf16, 151_936) == "cuda.score_rows"
    for op, dtype, vocabulary in (
        ("score_rows", bf16, 32_000),
        ("score_rows", bf16, 0),
        ("score_rows", torch.float32, 151_936),
        ("token_stats", bf16, 151_936),
    ):
        assert registry.select(op, CUDA, dtype, vocabulary) == f"triton.{op}"
    with vk.use_backend("triton"):
        assert registry.select("score_rows", CUDA, bf16, 151_936) == "triton.score_rows"
    hopper.append((8, 0))
    assert registry.select("score_rows", CUDA, bf16, 151_936) == "triton.score_rows"


@pytest.mark.usefixtures("hopper")
def test_cuda_stands_in_where_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU without triton the compiled kernels serve, not the reference."""
    missing = dataclasses.replace(registry.BACKENDS["triton"], probe=lambda: "triton does not import")
    monkeypatch.setitem(registry.BACKENDS, "triton", missing)
    assert registry.select("token_stats", CUDA, torch.bfloat16, 32_000) == "cuda.token_stats"
    assert registry.select("token_states", CUDA, torch.bfloat16, 16_000) == "cuda.token_states"
    assert registry.select("merged_statistics", CUDA, torch.float32) == "reference.merged_statistics"
    assert registry.select("segment_sum", CUDA, torch.float32) == "reference.segment_sum"


def test_a_gpu_that_is_too_old_is_named_with_what_it_needs(hopper: list[tuple[int, int]]) -> None:
    """A kernel without code for the device fails at launch, with an error that names no cure."""
    hopper.append((7, 5))
    (reason,) = registry.objections("cuda", "token_stats", CUDA, torch.float32)
    assert reason == "needs compute capability 8.0 or later, cuda has 7.5"


def test_every_measured_win_names_an_op_that_cuda_has() -> None:
    """A misspelt entry would be a win that never serves."""
    for wins in measured.MEASURED.values():
        for win in wins:
            assert win.op in registry.BACKENDS["cuda"].ops
            assert hasattr(torch, win.dtype)
            assert 0 < win.min_vocabulary <= win.max_vocabulary
