"""The package imports and works where its optional parts are missing, and says what is missing at the first
use, not before.

Each test is a fresh process: what is imported cannot be un-imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent

# A finder in front of all others that fails the import of the named modules, each with its own exception.
BLOCK = """
import sys, builtins, importlib.abc
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        for blocked, error in {blocked!r}.items():
            if name == blocked or name.startswith(blocked + "."):
                raise getattr(builtins, error)(f"{{name}} is blocked by the test")
sys.meta_path.insert(0, Blocked())
"""

TRAIN = """
import torch, warnings
import vcpo_kernels as vk
def train():
    logits = torch.randn(4, 3, 7, requires_grad=True)
    stats = vk.token_stats(logits, torch.randint(0, 7, (4, 3)))
    seg = vk.Segments.padded(torch.ones(4, 3))
    out = vk.vcpo_loss(stats, stats.logp.detach() - 0.1, torch.tensor([1.0, 0.0, 1.0, 1.0]), 2, seg)
    out.loss.backward()
    assert logits.grad.isfinite().all() and logits.grad.any()
"""


def run(code: str, blocked: dict[str, str] | None = None, **environment: str) -> str:
    """stdout of a fresh Python that runs `code`; a failure shows its stderr."""
    source = (BLOCK.format(blocked=blocked) if blocked else "") + textwrap.dedent(code)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=env, cwd="/", timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_no_optional_part_and_touches_no_device() -> None:
    """triton and the extension wait for their first use: import crashes on CPU machines were peers' worst
    (triton#6150).
    """
    out = run(
        """
        import sys, torch
        before = set(sys.modules)
        import vcpo_kernels
        new = set(sys.modules) - before
        print([m for m in new if m.split(".")[0] in ("triton", "numpy")])
        print([m for m in new if m == "vcpo_kernels._native" or m.startswith("vcpo_kernels.backends.n")])
        print(torch.cuda.is_initialized())
        """
    ).splitlines()
    assert out == ["[]", "[]", "False"]


def test_without_triton() -> None:
    """Installed and broken, which raises far more than ImportError: the CPU path does not care, and forcing
    it says why.
    """
    out = run(
        TRAIN
        + """
warnings.filterwarnings("ignore", category=UserWarning, module="vcpo_kernels")  # no extension: not the point
train()
try:
    with vk.use_backend("triton"):
        train()
except RuntimeError as problem:
    print(problem)
""",
        blocked={"triton": "RuntimeError"},
        TRITON_INTERPRET="1",
    )
    assert "triton: triton does not import (RuntimeError: triton is blocked by the test); `pip install triton`" in out
    assert "reference: can serve it" in out


def test_without_the_native_extension() -> None:
    """Training runs on the reference, with one warning that names the reason and the fix."""
    out = run(
        TRAIN
        + """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    train()
    train()
print(*[w.message for w in caught if w.category is UserWarning], sep="\\n")
try:
    with vk.use_backend("native"):
        train()
except RuntimeError as problem:
    print(problem)
""",
        blocked={"vcpo_kernels._native": "ImportError"},
    )
    lines = out.splitlines()
    slow = [line for line in lines if "slow reference backend" in line]
    assert len(slow) == 1
    assert "vcpo_kernels._native is blocked by the test" in slow[0]
    assert "pip install" in slow[0]
    forced = next(line for line in lines if line.startswith("token_stats: no backend can serve"))
    assert "asked for: native" in forced
    assert any(line.startswith("  native: the compiled extension") for line in lines)


def test_every_public_name_exists_and_is_documented() -> None:
    import vcpo_kernels as vk

    for name in vk.__all__:
        assert name == "__version__" or getattr(vk, name).__doc__, name
    assert sorted(vk.__all__) == vk.__all__
