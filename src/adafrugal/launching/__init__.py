"""Run a command's jobs: one after another, in parallel on this machine's GPUs, or on Slurm."""
