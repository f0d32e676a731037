"""Every sequence's exact gradient norm, and any weighted sum of the sequences' gradients: `SequenceGradients` in context.py.

A module leaves its input and output gradient (capture.py); what these make of its parameters' gradients is its rule
(module_rules.py), as factors (factors.py) of rows sorted by sequence (row_owners.py), of which norms are taken (norms.py,
outer_sqnorm.py). The fused head's part is head.py; opob_accumulator.py does the same one trajectory at a time.
"""
