"""One run from its settings to its record: identity, loop, evaluation, schedule, checkpoints."""
