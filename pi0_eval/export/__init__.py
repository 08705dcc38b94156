"""Exports of samplers, and the gate that compares each with its source before it gets its name."""
