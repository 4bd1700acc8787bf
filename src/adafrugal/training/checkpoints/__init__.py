"""Checkpoints: written beside the training, whole or in shards, and read again."""
