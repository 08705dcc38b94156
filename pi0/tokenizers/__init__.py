"""Text and actions to token ids, and back."""
