"""What differs between π0, π0.5 and π0-FAST outside of their models' code: one record each.

Whoever needs to know asks the record (`ModelConfig.family`), never the family's name. What differs in computation is a
method of the models, with the same name and signature in all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

EXPERTS = ("paligemma", "action_expert")


@dataclasses.dataclass(frozen=True)
class TextFormat:
    """How π0-FAST's prompts and tokens are laid out, which is a property of a checkpoint.

    Attributes:
        lowercase: whether the instruction is lower-cased.
        bos_after_prompt: whether a second `<bos>` follows the prompt; it begins what is written.
        skipped_positions: positions between the prompt and the first written token.
    """

    lowercase: bool
    bos_after_prompt: bool
    skipped_positions: int


TEXT_FORMATS = {
    "openpi": TextFormat(lowercase=True, bos_after_prompt=False, skipped_positions=1),
    "lerobot": TextFormat(lowercase=False, bos_after_prompt=True, skipped_positions=0),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        title: its name for people.
        experts: the Gemma experts it has.
        adaptive_norms: whether the action expert's norms depend on the flow time.
        projections: its projections beside `action_out_proj`, and the axes of their kernels (see `pi0.parameters`).
        state_tokens: tokens of the suffix before those of the actions: the state, in π0.
        normalization: the normalization mode of released models.
        prompt: the format of its prompt, in `pi0.robots.pipeline`: "text", "state" or "fast".
        action_tokens: whether its actions are FAST tokens, written as text, instead of sampled from noise.
        masked_cameras: whether a missing camera is masked; if not, it is a dummy: a zero image that is attended to.
        recipe: whether it can be trained by a `RecipeConfig`, to write subtasks, answers and FAST tokens.
        training_inputs: the fields of `Observation` that it trains on and does not need for inference.
        query_rounding: the place of `pi0.numerics.ROUNDING` at which its language model rounds rotated queries.
        attentions: the implementations of attention it can use in JAX.
    """

    title: str
    experts: tuple[str, ...] = EXPERTS
    adaptive_norms: bool = False
    projections: Mapping[str, str] = dataclasses.field(default_factory=dict)
    state_tokens: int = 0
    normalization: str = "quantile"
    prompt: str = "text"
    action_tokens: bool = False
    masked_cameras: bool = True
    recipe: bool = False
    training_inputs: tuple[str, ...] = ()
    query_rounding: str = "queries"
    attentions: tuple[str, ...] = ("plain", "xla", "cudnn")


FAMILIES = {
    "pi0": Family(
        title="π0",
        projections={
            "action_in_proj": "a d",
            "state_proj": "z d",
            "action_time_mlp_in": "u d",
            "action_time_mlp_out": "d e",
        },
        state_tokens=1,
        normalization="zscore",
    ),
    "pi05": Family(
        title="π0.5",
        adaptive_norms=True,
        projections={"action_in_proj": "a d", "time_mlp_in": "d e", "time_mlp_out": "d e"},
        prompt="state",
        recipe=True,
        training_inputs=("token_group", "has_actions"),
    ),
    "pi0_fast": Family(
        title="π0-FAST",
        experts=EXPERTS[:1],
        prompt="fast",
        action_tokens=True,
        masked_cameras=False,
        training_inputs=("token_ar_mask", "token_loss_mask"),
        query_rounding="fast_queries",
        attentions=("plain",),
    ),
}
