"""Checkpoints: file formats, parameter layouts, conversion, LoRA merging, inspection. NumPy only, no jax, no torch."""
