"""What a run trains for."""
