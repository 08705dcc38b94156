"""This project, in either framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import serve, time_batches

from pi0.config import ModelConfig
from pi0_eval.parity.inputs import Inputs
from pi0_eval.random_models import random_inputs, torch_sampler


def prepare(job: dict[str, Any]) -> Callable[[], Any]:
    config = ModelConfig.from_dict(job["config"])
    if job["task"] == "data":
        return data(job)
    make = {"jax": prepare_jax, "torch": prepare_torch, "export": prepare_export}[job["framework"]]
    return make(config, job["task"], job["batch"], job)


def prepare_jax(config: ModelConfig, task: str, batch: int, job: dict[str, Any]) -> Callable[[], Any]:
    import jax
    from flax import nnx

    from pi0_jax.loading import make_model
    from pi0_jax.sampler import Sampler

    model = jax.jit(lambda: make_model(config, rngs=nnx.Rngs(0)))()
    if task == "sample":
        sampler, inputs = Sampler(model, warm_up=False), random_inputs(config, len(config.image_keys), batch)
        return lambda: jax.block_until_ready(sampler.sample(*inputs))
    run = jax.jit(jax.value_and_grad(lambda model, *inputs: model.compute_loss(*inputs).mean()))
    drawn = whole_inputs(config, batch)
    arrays = drawn.observation, drawn.actions, drawn.noise, drawn.time
    return lambda: jax.block_until_ready(run(model, *arrays))


def prepare_torch(config: ModelConfig, task: str, batch: int, job: dict[str, Any]) -> Callable[[], Any]:
    import torch

    from pi0_torch.loading import make_model, to_device

    compile = bool(job.get("compile"))
    if task == "sample":
        inputs = random_inputs(config, len(config.image_keys), batch)
        sampler = torch_sampler(config, config.runtime.num_steps, compile=compile, quantize=job.get("quantize", ""))
        return lambda: sampler.sample(*inputs)
    model: Any = make_model(config)
    drawn = whole_inputs(config, batch)
    arrays = [torch.from_numpy(array) for array in (drawn.actions, drawn.noise, drawn.time)]
    observation = to_device(drawn.observation, torch.device("cpu"))
    loss = torch.compile(model.compute_loss) if compile else model.compute_loss

    def run() -> None:
        model.zero_grad()
        loss(observation, *arrays).mean().backward()

    return run


def prepare_export(config: ModelConfig, task: str, batch: int, job: dict[str, Any]) -> Callable[[], Any]:
    from pi0.policy.exported import ExportedSampler
    from pi0.policy.manifest import Manifest
    from pi0_eval.export.runners import open_runner

    folder = Path(job["folder"])
    manifest = Manifest.load(folder)
    sampler = ExportedSampler(manifest, config, open_runner(folder, manifest))
    inputs = random_inputs(config, len(config.image_keys), batch)
    return lambda: sampler.sample(*inputs)


def whole_inputs(config: ModelConfig, batch: int) -> Inputs:
    """Inputs with every camera and text of the full length, as the other sides have."""
    observation, noise = random_inputs(config, len(config.image_keys), batch)
    return dataclasses.replace(Inputs.random(config, batch), observation=observation, noise=noise)


def data(job: dict[str, Any]) -> Callable[[], Any]:
    """A batch of training: images of the model's size, state, actions, text; as `root`, `format` and `cache` say."""
    from pi0.robots.registry import make_robot
    from pi0.run_config import DataConfig, RunConfig
    from pi0.training.data import Loader, load_data

    config = ModelConfig.from_dict(job["config"])
    config = dataclasses.replace(config, image_keys=tuple(make_robot(job["robot"]).cameras.values()))
    settings = DataConfig(
        job["robot"],
        "peers",
        job.get("root", job["dataset"]),
        tokenizer="bundled://tokenizer.model",
        workers=job["workers"],
        format=job.get("format", "lerobot"),
        cache=job.get("cache", ""),
        skip_damaged=True,
        augment=False,  # as on the other side
    )
    _, batches, _ = load_data(RunConfig(config, settings, batch_size=job["batch"]))
    loader: Iterator[Any] = iter(Loader(batches, config, np.arange(job["batch"]), lambda x: x, workers=job["workers"]))

    return lambda: time_batches(loader, job["batches"])


if __name__ == "__main__":
    serve(prepare)
