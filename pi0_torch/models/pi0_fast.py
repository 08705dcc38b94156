"""π0-FAST: a vision-language model that writes actions as text tokens, one after the other.

Axes: B batch, S tokens, L text tokens, W width, V vocabulary, D decoded tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pi0 import numerics
from pi0.config import ModelConfig
from pi0.observation import Observation
from pi0_torch.models.gemma import joint_forward
from pi0_torch.models.vision_language import ReadToken, VisionLanguageModel, attention_mask


class Pi0Fast(VisionLanguageModel):
    """π0-FAST: PaliGemma alone."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, queries="fast_queries")

    def text_blocks(self, observation: Observation) -> Int[Tensor, "B S"]:
        """Mask blocks of all tokens: cameras and prompt are block 0, tokens to be predicted one block each."""
        starts = observation.token_ar_mask
        text = torch.zeros_like(observation.tokenized_prompt) if starts is None else starts.cumsum(dim=1)
        return F.pad(text, (self.config.prefix_len - self.config.max_token_len, 0))

    def compute_loss(self, observation: Observation, stages: dict[str, Tensor] | None = None) -> Float[Tensor, " B"]:
        """Cross-entropy of the next token, mean over those that `token_loss_mask` asks for, float32.

        `stages`, where given, receives every intermediate result that `pi0_eval.parity` compares. Raises ValueError
        for an observation without the masks of training.
        """
        if observation.token_ar_mask is None or observation.token_loss_mask is None:
            raise ValueError("the observation has no token_ar_mask and token_loss_mask, which the loss needs")
        prefix, valid = self.embed_prefix(observation, stages)
        inputs, valid = prefix[:, :-1], valid[:, :-1]  # the last token predicts nothing
        blocks = self.text_blocks(observation)[:, :-1]
        (pre_logits,), _ = joint_forward(
            (self.paligemma,),
            (inputs,),
            (valid.cumsum(dim=1) - 1,),
            attention_mask(blocks, blocks, valid, valid),
            (None,),
            stages=stages,
        )
        targets, wanted = observation.tokenized_prompt[:, 1:], observation.token_loss_mask[:, 1:]
        logits = self.paligemma.logits(pre_logits[:, -targets.shape[1] :])
        log_p = logits.log_softmax(dim=-1).gather(-1, targets[..., None].long())[..., 0]
        loss = -(log_p * wanted).sum(dim=1) / wanted.sum(dim=1).clamp(min=1)
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

    @torch.no_grad()
    def sample_tokens(
        self,
        observation: Observation,
        max_decoding_steps: int | None = None,
        *,
        temperature: float = 0.0,
        rng: torch.Generator | None = None,
        allowed: Bool[Tensor, " V"] | None = None,
        eos_token: int = numerics.EOS_TOKEN,
        read_token: ReadToken | None = None,
    ) -> Int[Tensor, "B D"]:
        """Write text after the prompt: int32, each row ends with `eos_token` and then zeros, or is cut.

        The options and errors are those of `decode`; `max_decoding_steps` defaults to the config's.

        The prefix runs once; every new token's keys and values go to their place in a cache of the final length. Token
        i has the position prefix length + i + 1: the released implementation skips one, and its checkpoints are used
        that way. It also shifts the prefix to the right end of the cache, which changes nothing: attention sees
        positions and the mask, not places.
        """
        steps = self.config.runtime.max_decoding_steps if max_decoding_steps is None else max_decoding_steps
        prefix, valid = self.embed_prefix(observation)
        blocks = self.text_blocks(observation)
        mask = attention_mask(blocks, blocks, valid, valid)
        positions = valid.cumsum(dim=1) - 1
        (out,), cache = joint_forward((self.paligemma,), (prefix,), (positions,), mask, (None,))
        tokens, _ = self.decode(
            out,
            cache,
            valid,
            steps,
            skipped=1,
            temperature=temperature,
            rng=rng,
            allowed=allowed,
            eos_token=eos_token,
            read_token=read_token,
        )
        return tokens
