"""Robots: adapters between their data and the models, transforms, norm stats and the pipeline of all three."""
