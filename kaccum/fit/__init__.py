"""Takes a model's training step over, and knows when a window closes."""
