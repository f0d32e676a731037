"""What many ranks add: averages of gradients that were formed outside of DDP's own hooks."""

from vcpo_kernels.parallel.averaging import average_gradients

__all__ = ["average_gradients"]
