"""What many ranks share: groups, shards, the few sums that cross them, and averages of gradients formed outside of DDP."""

from vcpo_kernels.parallel.averaging import average_gradients

__all__ = ["average_gradients"]
