"""openpi from a checkout, in either framework, with the sizes of the job.

openpi has names for the released sizes only, so its tables of variants are replaced. `remat`: its JAX recomputes every
layer in the backward pass and has no option for it; without, `nn.remat` is replaced by the identity.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from common import serve

sys.path.append(str(Path(__file__).parents[2] / "tests" / "peers"))
from run_lerobot import set_sizes


def prepare(job: dict[str, Any]) -> Callable[[], Any]:
    return {"jax": prepare_jax, "torch": prepare_torch}[job["framework"]](job)


def settings(job: dict[str, Any], **more: Any) -> Any:
    """openpi's config of the job's sizes."""
    import openpi.models.gemma as gemma
    import openpi.models.pi0_config as pi0_config

    sizes = job["config"]
    table = {"gemma_2b": sizes["paligemma"], "gemma_300m": sizes["action_expert"]}
    fields = ("width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")
    gemma.get_config = lambda variant: gemma.Config(**{name: table[variant][name] for name in fields})
    gemma.PALIGEMMA_VOCAB_SIZE = sizes["vocab_size"]
    return pi0_config.Pi0Config(
        dtype=sizes["runtime"]["dtype"],
        action_dim=sizes["action_dim"],
        action_horizon=sizes["action_horizon"],
        max_token_len=sizes["max_token_len"],
        pi05=sizes["kind"] == "pi05",
        **more,
    )


def arrays(job: dict[str, Any]) -> dict[str, Any]:
    """An observation, actions, noise and time, every camera there and text of the full length."""
    rng, sizes, batch = np.random.default_rng(0), job["config"], job["batch"]
    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    chunk, image = (batch, sizes["action_horizon"], sizes["action_dim"]), (batch, *sizes["image_resolution"], 3)
    return {
        "images": {name: rng.uniform(-1, 1, image).astype(np.float32) for name in cameras},
        "image_masks": {name: np.ones(batch, bool) for name in cameras},
        "state": rng.normal(size=(batch, sizes["action_dim"])).astype(np.float32),
        "tokenized_prompt": rng.integers(0, sizes["vocab_size"], (batch, sizes["max_token_len"])).astype(np.int32),
        "tokenized_prompt_mask": np.ones((batch, sizes["max_token_len"]), bool),
        "actions": rng.normal(size=chunk).astype(np.float32),
        "noise": rng.normal(size=chunk).astype(np.float32),
        "time": rng.uniform(0.1, 0.9, batch).astype(np.float32),
    }


def prepare_jax(job: dict[str, Any]) -> Callable[[], Any]:
    import flax.linen as linen
    import jax
    import openpi.models.model as model_file
    import openpi.models.pi0 as pi0
    import openpi.models.siglip as siglip
    import openpi.shared.nnx_utils as nnx_utils
    from flax import nnx

    if not job["remat"]:
        linen.remat = lambda block, **_: block
    vision, given = job["config"]["vision"], arrays(job)
    named = {name: vision[name] for name in ("width", "depth", "mlp_dim", "num_heads")}
    siglip.decode_variant = lambda _: named | {"patch_size": (vision["patch_size"],) * 2}
    model = pi0.Pi0(settings(job), rngs=nnx.Rngs(0))
    actions, noise = given.pop("actions"), given.pop("noise")
    del given["time"]
    observation = model_file.Observation(**jax.tree.map(jax.numpy.asarray, given))
    key = jax.random.key(0)
    if job["task"] == "sample":
        sample = nnx_utils.module_jit(model.sample_actions)
        return lambda: jax.block_until_ready(sample(key, observation, noise=noise, num_steps=10))
    parts, state = nnx.split(model)

    def loss(state: Any) -> Any:
        return nnx.merge(parts, state).compute_loss(key, observation, actions, train=False).mean()

    run = jax.jit(jax.value_and_grad(loss))
    return lambda: jax.block_until_ready(run(state))


def prepare_torch(job: dict[str, Any]) -> Callable[[], Any]:
    import openpi.models_pytorch.gemma_pytorch as gemma_pytorch
    import openpi.models_pytorch.pi0_pytorch as pi0_pytorch
    import torch

    sizes = job["config"]
    paligemma, expert = gemma_pytorch.PaliGemmaForConditionalGeneration, gemma_pytorch.GemmaForCausalLM

    def make_paligemma(config: Any) -> Any:
        return paligemma(config=set_sizes(config, sizes))

    def make_expert(config: Any) -> Any:
        config.vocab_size = sizes["vocab_size"]
        return expert(config=config)

    gemma_pytorch.PaliGemmaForConditionalGeneration, gemma_pytorch.GemmaForCausalLM = make_paligemma, make_expert
    model = pi0_pytorch.PI0Pytorch(settings(job, pytorch_compile_mode="default" if job["compile"] else None))
    torch.set_float32_matmul_precision("highest")
    prepare_images = model._preprocess_observation
    model._preprocess_observation = lambda observation, train=True: prepare_images(observation, train=False)
    given: Any = {k: v if isinstance(v, dict) else torch.from_numpy(v) for k, v in arrays(job).items()}
    given["images"] = {k: torch.from_numpy(v).permute(0, 3, 1, 2) for k, v in given["images"].items()}
    given["image_masks"] = {k: torch.from_numpy(v) for k, v in given["image_masks"].items()}
    actions, noise, time = (given.pop(name) for name in ("actions", "noise", "time"))
    given |= {"token_ar_mask": None, "token_loss_mask": None}
    observation = SimpleNamespace(**given)
    if job["task"] == "sample":
        return lambda: model.eval().sample_actions("cpu", observation, noise=noise, num_steps=10)
    loss = torch.compile(model.forward) if job["compile"] else model.forward

    def run() -> None:
        model.zero_grad()
        loss(observation, actions, noise, time).mean().backward()

    return run


if __name__ == "__main__":
    serve(prepare)
