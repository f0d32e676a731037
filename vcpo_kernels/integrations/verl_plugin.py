"""What the entry point group `verl.plugins` names: verl imports it, nothing more, in every process of its own."""

from vcpo_kernels.integrations.verl import register

register()
