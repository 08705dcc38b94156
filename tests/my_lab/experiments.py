"""An experiment of another package, named as "tests.my_lab.experiments:towels"."""

from __future__ import annotations

from pi0.run_config import DataConfig, OptimizerConfig, RunConfig
from pi0.variants import get_variant


def towels(variant: str = "tiny") -> RunConfig:
    """Two steps of a tiny model on the robot, the dataset format and the cameras of this package."""
    data = DataConfig(
        format="tests.my_lab.datasets:NpzDataset",
        robot="tests.my_lab.robots:TwoCameras",
        asset_id="towels",
        tokenizer="bundled://tokenizer.model",
        workers=0,
        augment=False,
    )
    optimizer = OptimizerConfig(warmup_steps=1)
    model = get_variant(variant, max_token_len=16)
    return RunConfig(model=model, data=data, optimizer=optimizer, batch_size=4, steps=2, save_every=2, eval_every=0)
