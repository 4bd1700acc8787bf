"""The record of a run, and its copies at W&B and for TensorBoard."""
