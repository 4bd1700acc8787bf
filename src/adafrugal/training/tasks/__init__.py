"""The tasks of a run: pre-training and fine-tuning."""
