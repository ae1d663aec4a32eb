"""What a micro-batch does: its training step, overheard."""
