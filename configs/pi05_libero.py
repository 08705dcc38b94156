"""π0.5 on LIBERO (openpi `pi05_libero`, but with the state in the prompt, as π0.5 was trained).

As there, without it: --config.data.state_in_prompt=False
pi0-train --config pi05_libero --config.data.root=data/libero --workdir runs/libero
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs._shared import RELEASED, experiment
from pi0.run_config import DataConfig, OptimizerConfig
from pi0.variants import get_variant


def get_config() -> ConfigDict:
    """The experiment."""
    return experiment(
        get_variant("pi05", action_horizon=10),
        DataConfig(robot="libero", asset_id="libero"),
        base_checkpoint=f"{RELEASED}/pi05_base",
        optimizer=OptimizerConfig(peak_lr=5e-5, final_lr=5e-5, warmup_steps=10_000),
        ema_decay=0.999,
        batch_size=256,
    )
