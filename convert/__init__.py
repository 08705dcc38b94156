"""Layouts, conversion and parity of π checkpoints. Importing this package needs neither jax nor torch."""
