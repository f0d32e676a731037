"""Layer: rows of logits [N, V] -> tokens [N]. The passes over the logits, and the ops by which a loss enters autograd."""
