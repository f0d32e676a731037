"""Layer: tokens [N] -> sequences [B] -> scalars. Segments, importance weights, ESS, baselines, and VCPO's loss."""
