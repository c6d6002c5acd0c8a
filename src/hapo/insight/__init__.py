"""What a run leaves behind, and what can be seen in it."""
