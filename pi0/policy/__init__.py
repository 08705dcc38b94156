"""A policy: observations in, actions out."""
