"""Compare two checkpoints stage by stage, in either framework."""
