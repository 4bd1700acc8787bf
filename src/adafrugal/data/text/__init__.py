"""Documents and tokenizers."""
