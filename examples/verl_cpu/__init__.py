"""verl with VCPO on a CPU: its own `main_ppo`, Ray, two FSDP2 actors and `RayPPOTrainer.fit` on a tiny model, in a minute.

    make demo-verl                          # makes .venv-verl, and runs
    .venv-verl/bin/python -m examples.verl_cpu --steps 12

`VCPO` in `__main__.py` is what a run of yours takes over, with `external.py`, which verl imports in each of its processes. The
rest stands in for a GPU (`cpu_platform.py`) and for vLLM or SGLang (`sampler.py`), through verl's extension points.
"""
