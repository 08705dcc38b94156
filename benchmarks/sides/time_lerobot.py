"""LeRobot 0.6.1 in its own environment (tests/peers/make_env.sh), with the sizes of the job."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import serve, time_batches

sys.path.append(str(Path(__file__).parents[2] / "tests" / "peers"))
from run_lerobot import import_torchvision, shrink


def prepare(job: dict[str, Any]) -> Callable[[], Any]:
    import_torchvision()
    return data(job) if job["task"] == "data" else model_call(job)


def model_call(job: dict[str, Any]) -> Callable[[], Any]:
    import lerobot.policies.pi0.modeling_pi0 as module
    from lerobot.policies.pi0.configuration_pi0 import PI0Config

    sizes, batch = job["config"], job["batch"]
    shrink(module, sizes)
    config = PI0Config(
        device="cpu",
        chunk_size=sizes["action_horizon"],
        n_action_steps=sizes["action_horizon"],
        max_state_dim=sizes["action_dim"],
        max_action_dim=sizes["action_dim"],
        tokenizer_max_length=sizes["max_token_len"],
        image_resolution=tuple(sizes["image_resolution"]),
        compile_model=job["compile"],
        compile_mode="default",
    )
    model = module.PI0Pytorch(config)
    torch.set_float32_matmul_precision("highest")
    images = [torch.rand(batch, 3, *sizes["image_resolution"]) * 2 - 1 for _ in range(3)]
    masks = [torch.ones(batch, dtype=torch.bool) for _ in images]
    text = torch.randint(0, sizes["vocab_size"], (batch, sizes["max_token_len"]))
    given = images, masks, text, torch.ones_like(text, dtype=torch.bool), torch.randn(batch, sizes["action_dim"])
    actions, noise = torch.randn(2, batch, sizes["action_horizon"], sizes["action_dim"])
    if job["task"] == "sample":
        return lambda: model.eval().sample_actions(*given, noise=noise)
    time = torch.rand(batch)

    def run() -> None:
        model.zero_grad()
        model.forward(*given, actions, noise, time).mean().backward()

    return run


def data(job: dict[str, Any]) -> Callable[[], Any]:
    """Batches of its dataset, shuffled, in its usual DataLoader: images as recorded, state, chunks of actions, text."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata

    metadata = LeRobotDatasetMetadata("peers/data", root=job["dataset"])
    chunk = [i / metadata.fps for i in range(job["config"]["action_horizon"])]
    dataset = LeRobotDataset(
        "peers/data", root=job["dataset"], delta_timestamps={"action": chunk}, video_backend=job["video_backend"]
    )
    options = {"num_workers": job["workers"], "persistent_workers": True, "prefetch_factor": 2}
    generator = torch.Generator().manual_seed(0)

    def endless() -> Iterator[Any]:
        loader: Any = torch.utils.data.DataLoader(
            dataset, job["batch"], shuffle=True, drop_last=True, generator=generator, **options
        )
        while True:
            yield from loader

    batches = endless()
    return lambda: time_batches(batches, job["batches"])


if __name__ == "__main__":
    serve(prepare)
