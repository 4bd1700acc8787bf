"""Where text comes from, its tokens, and the batches that are made of them."""
