"""Other memory-efficient optimizers to compare with, from their papers' formulas, in plain torch."""
