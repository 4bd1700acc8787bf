"""What every room stands on: errors, secrets, signals, files, other processes. Imports nothing of this project."""
