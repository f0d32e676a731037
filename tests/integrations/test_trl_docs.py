"""docs/trl.md: its code runs as printed, and every option that is refused is on the page."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from tests.integrations import trl_setup as setup
from vcpo_kernels.integrations.trl import VCPOTrainer, VCPOTrainingConfig, options
from vcpo_kernels.sequences.vcpo_coefficients import METRICS

PAGE = (Path(__file__).parents[2] / "docs" / "trl.md").read_text()


def test_the_switch_runs_as_printed(tmp_path: Path, monkeypatch: Any) -> None:
    switch, asynchronous = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    setup.model().save_pretrained(tmp_path / "model")
    setup.tokenizer().save_pretrained(tmp_path / "model")
    # What the reader's machine decides: no GPU here, and three steps of short completions are enough.
    small = setup.arguments(tmp_path).to_dict()
    init = VCPOTrainingConfig.__init__

    def on_a_cpu(self: Any, **given: Any) -> None:
        init(self, **{k: small[k] for k in SMALL} | given)

    monkeypatch.setattr(VCPOTrainingConfig, "__init__", on_a_cpu)
    names: dict[str, Any] = {
        "model": str(tmp_path / "model"), "reward": setup.reward, "dataset": setup.dataset(), "output_dir": str(tmp_path),
    }  # fmt: skip
    exec(switch, names)
    assert isinstance(names["trainer"], VCPOTrainer)
    assert names["trainer"].state.global_step == 3
    exec(asynchronous, {})


SMALL = ("use_cpu", "bf16", "report_to", "max_steps", "per_device_train_batch_size", "num_generations",
         "max_completion_length", "save_strategy", "disable_tqdm")  # fmt: skip


def test_every_refused_option_and_every_metric_is_on_the_page() -> None:
    refused = {*options.GRPO.refused, *options.GRPO.limited, *options.GRPO.unset}
    own = {f.name for f in dataclasses.fields(VCPOTrainingConfig)} - {
        f.name for f in dataclasses.fields(VCPOTrainingConfig.__base__)
    }
    metrics = {f"vcpo/{name}" for name in (*METRICS, "baseline_mean", "rate_scale")}
    missing = [name for name in sorted(refused | own | metrics) if not re.search(rf"`{name}\b", PAGE)]
    assert not missing
    tables = PAGE.split("Refused, by name")[1]
    assert not [name for name in options.GRPO.honoured if f"| `{name}`" in tables]
