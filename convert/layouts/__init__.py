"""Parameter layouts, one declarative table each."""
