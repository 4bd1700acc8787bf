"""Build models, their loss, their optimizers and learning rates from the settings."""
