"""A command's jobs: one after the other, side by side on this machine's GPUs, or on Slurm."""
