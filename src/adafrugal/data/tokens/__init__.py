"""Token stores: written once, read by position."""
