"""π0-FAST: a vision-language model that writes actions as text tokens, one after the other.

Axes: B batch, S tokens, L text tokens, W width, V vocabulary, D decoded tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pi0 import numerics
from pi0.masks import block_mask
from pi0.observation import Observation
from pi0.recording import record
from pi0.run_config import RecipeConfig
from pi0_jax.models.vision_language import VisionLanguageModel


class Pi0Fast(VisionLanguageModel):
    """π0-FAST: PaliGemma alone."""

    def text_blocks(self, observation: Observation) -> Int[Array, "B S"]:
        """Blocks of all tokens: images and prompt are block 0, tokens to be predicted one block each."""
        starts = observation.token_ar_mask
        text = jnp.zeros_like(observation.tokenized_prompt) if starts is None else jnp.cumsum(starts, axis=1)
        return jnp.pad(text, ((0, 0), (self.config.prefix_len - self.config.max_token_len, 0)))

    def compute_loss(
        self,
        observation: Observation,
        actions: Float[Array, "B T A"] | None = None,
        noise: Float[Array, "B T A"] | None = None,
        time: Float[Array, " B"] | None = None,
        stages: dict[str, Array] | None = None,
    ) -> Float[Array, " B"]:
        """Cross-entropy of the next token, mean over those that `token_loss_mask` asks for, float32.

        The actions are tokens of the observation: `actions`, `noise` and `time`, of other models, are not read.
        `stages`, where given, receives every intermediate result that `pi0_eval.parity` compares. Raises ValueError
        for an observation without the masks of training.
        """
        if observation.token_ar_mask is None or observation.token_loss_mask is None:
            raise ValueError("the observation has no token_ar_mask and token_loss_mask, which the loss needs")
        prefix, valid = self.embed_prefix(observation, stages)
        inputs, valid = prefix[:, :-1], valid[:, :-1]  # the last token predicts nothing
        blocks = self.text_blocks(observation)[:, :-1]
        pre_logits, _ = self.read_prefix(inputs, valid, block_mask(blocks, valid), stages)
        targets, wanted = observation.tokenized_prompt[:, 1:], observation.token_loss_mask[:, 1:]
        logits = record("vocabulary logits", self.paligemma.logits(pre_logits[:, -targets.shape[1] :]))
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        record("log probabilities", log_p)
        loss = -(log_p * wanted).sum(axis=1) / jnp.maximum(wanted.sum(axis=1), 1)
        if stages is not None:
            stages.update(
                prefix_tokens=inputs,
                prefix_layers=stages.pop("layers.0"),
                pre_logits=pre_logits,
                logits=logits,
                loss=loss,
                prefix_valid=valid,
            )
        return loss

    def loss_parts(
        self,
        observation: Observation,
        actions: Float[Array, "B T A"] | None = None,
        noise: Float[Array, "B T A"] | None = None,
        time: Float[Array, " B"] | None = None,
        recipe: RecipeConfig | None = None,
        delay: Int[Array, " B"] | None = None,
    ) -> dict[str, Array]:
        """The parts of the training loss, float32: `tokens` [B]. No recipe and no delay has a place here."""
        assert recipe is None and delay is None, "this model has neither a recipe nor delays"
        return {"tokens": self.compute_loss(observation)}

    def sample(
        self, observation: Observation, noise: Float[Array, "B T A"] | None = None, num_steps: int | None = None
    ) -> Int[Array, "B D"]:
        """Action tokens: `sample_tokens`, greedily, at most `num_steps`. `noise`, of other models, is not read."""
        return self.sample_tokens(observation, num_steps)

    def sample_tokens(
        self,
        observation: Observation,
        max_decoding_steps: int | None = None,
        *,
        temperature: float = 0.0,
        rng: Array | None = None,
        allowed: Bool[Array, " V"] | None = None,
        eos_token: int = numerics.EOS_TOKEN,
        stages: dict[str, Array] | None = None,
    ) -> Int[Array, "B D"]:
        """Write text after the prompt: int32, each row ends with `eos_token` and then zeros, or is cut.

        The options and errors are those of `decoding.decode`; `max_decoding_steps` (default: the config's) and
        `temperature` are static.

        The prefix runs once; every new token's keys and values go to their place in a cache of the final length. Token
        i has the position prefix length + i + 1: openpi skips one, and its checkpoints are used that way (LeRobot skips
        none, see `pi0.families.TextFormat`). openpi also shifts the prefix to the right end of the cache, which changes
        nothing: attention depends on positions and the mask, not on places.
        """
        steps = self.config.runtime.max_decoding_steps if max_decoding_steps is None else max_decoding_steps
        prefix, valid = self.embed_prefix(observation)
        out, cache = self.read_prefix(prefix, valid, block_mask(self.text_blocks(observation), valid))
        options = {"temperature": temperature, "rng": rng, "allowed": allowed, "eos_token": eos_token, "stages": stages}
        return self.decode(out, cache, valid, steps, skipped=self.config.format.skipped_positions, **options)[0]
