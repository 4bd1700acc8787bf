"""The record that a run keeps of itself, and its copy to W&B."""
