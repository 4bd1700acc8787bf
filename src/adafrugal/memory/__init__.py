"""Estimate the memory of a run before it starts, and measure it while it goes on."""
