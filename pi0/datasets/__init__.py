"""Recorded robot data: dataset formats, caches, mixtures, batches, statistics and checks."""
