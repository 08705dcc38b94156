"""Evaluation above both frameworks: parity, replay, scores, benchmarks, demo."""
