"""What VERL_USE_EXTERNAL_MODULES names: verl imports it in each of its processes, in the midst of `import verl`."""

from examples.verl_cpu import cpu_platform, sampler
from vcpo_kernels.integrations.verl import hand_over_log_probs

cpu_platform.register()
sampler.register()
hand_over_log_probs()  # OPOB's: docs/verl.md
