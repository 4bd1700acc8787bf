"""The record of a run, and its copy at W&B."""
