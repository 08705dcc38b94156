"""Checkpoints and policies compared, measured and shown; above both frameworks."""
