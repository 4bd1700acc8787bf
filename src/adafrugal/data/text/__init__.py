"""Documents and the tokenizers that cut them."""
