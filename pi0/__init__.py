"""What both frameworks share: configs, observations, tokenizers, normalization, robots, datasets. NumPy only."""

__version__ = "0.1.0"
