"""Simulated robots by name: `make_environment`."""

from pi0_eval.environments.environment import Environment, EnvironmentFailed, Expert
from pi0_eval.environments.registry import ENVIRONMENTS, find_tasks, make_environment

__all__ = ["ENVIRONMENTS", "Environment", "EnvironmentFailed", "Expert", "find_tasks", "make_environment"]
