"""Language models, built with transformers from their shapes, and their loss."""
