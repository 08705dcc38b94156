"""A tiny model of any family on the bundled Meta-World recordings: every part of a run, in seconds. It learns little.

pi0-train --config debug --workdir runs/debug
pi0-train --config debug:tiny_pi05 --workdir runs/debug_pi05
pi0-train --config debug:tiny_pi0_fast --workdir runs/debug_pi0_fast
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import metaworld_demo
from pi0.config import ConfigError
from pi0.variants import get_variant

DEMO = {"tiny": "demo", "tiny_pi05": "demo_pi05", "tiny_pi0_fast": "demo_pi0_fast"}


def get_config(variant: str = "tiny") -> ConfigDict:
    """The demo's experiment, a few steps of it; `variant` names a tiny model."""
    if variant not in DEMO:
        raise ConfigError(f"no tiny model {variant!r} to debug with; choose one of {', '.join(DEMO)}")
    config, demo = metaworld_demo.get_config(DEMO[variant]), get_variant(DEMO[variant])
    sizes = {name: getattr(demo, name) for name in ("max_token_len", "vocab_size", "image_keys")}
    sizes["max_decoding_steps"] = demo.runtime.max_decoding_steps
    config.model = get_variant(variant, **sizes).to_dict()
    config.optimizer.warmup_steps = 2
    config.update({"batch_size": 4, "steps": 10, "log_every": 2, "eval_every": 10, "save_every": 10})
    return config
