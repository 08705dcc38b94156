"""Numerical comparison of checkpoints, stage by stage, across frameworks."""
