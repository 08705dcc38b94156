"""How XLA compiles where the last bit counts."""

# The level of users' programs; `conftest.py` chooses a lower one for the tests, which compile much and run little.
AS_IN_USE = {"xla_backend_optimization_level": 3}
