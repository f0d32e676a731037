"""What the entry point group `verl.plugins` names: verl imports it, nothing more, in every process of its own."""

import importlib.util

from vcpo_kernels.integrations.verl import register

if importlib.util.find_spec("verl") is not None:  # a documentation tool may import this where there is no verl
    register()
