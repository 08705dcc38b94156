"""What a training step takes on chips that need not be there."""
