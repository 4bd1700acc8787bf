"""The optimizer on shards of parameters."""
