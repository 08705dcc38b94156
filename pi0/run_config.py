"""The config of a training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pi0.config import ConfigError


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    """The loss = `text_weight`·CE(subtask or answer) + `fast_weight`·CE(FAST tokens) + `flow_weight`·flow matching.

    A part whose weight is 0 is not computed. `insulated` keeps the flow's gradient out of PaliGemma and the vision
    tower (knowledge insulation). Pre-training has no flow; the defaults are those of post-training, where
    `flow_weight` is the paper's α (π0.5 paper, equation 1). Raises ConfigError for impossible weights.
    """

    text_weight: float = 1.0
    fast_weight: float = 1.0
    flow_weight: float = 10.0
    insulated: bool = True

    def __post_init__(self) -> None:
        weights = self.weights
        if not all(isinstance(w, int | float) and 0 <= w < float("inf") for w in weights.values()) or not any(
            weights.values()
        ):
            raise ConfigError(f"recipe weights are {weights}; each must be 0 or positive, and one positive")
        if not isinstance(self.insulated, bool):
            raise ConfigError(f"recipe.insulated is {self.insulated!r}; it must be true or false")

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each part of the loss."""
        return {"text": self.text_weight, "fast": self.fast_weight, "flow": self.flow_weight}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RecipeConfig:
        """The recipe of a config's values. Raises ConfigError for unknown ones."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"recipe has unknown fields {unknown}; known fields are {sorted(known)}")
        return cls(**values)
