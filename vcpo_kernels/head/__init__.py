"""Layer: rows of hidden states [N, H] -> tokens [N]. The same passes with the language-model head's GEMMs around them."""
