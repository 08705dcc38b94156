"""What openpi's configs say of its checkpoints, and no file or tensor does: robot, cameras, horizon, prompt, asset id.

A preset has the name of the config (openpi `training/config.py`, `misc/roboarena_config.py`, `misc/polaris_config.py`
at 15a9616) and completes a checkpoint that was trained with it: `Policy.from_pretrained(source, preset="pi05_droid")`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from pi0.assets import Assets
from pi0.config import ConfigError, ModelConfig
from pi0.families import EXPERTS, FAMILIES
from pi0.parameters import LayoutError, lora_of

FIELDS = ("action_horizon", "action_dim", "max_token_len", "image_keys")  # of ModelConfig, which a preset says

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
FAST_CAMERAS = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")

Robot = dict[str, Any]
WRISTS = ["cam_left_wrist", "cam_right_wrist"]
ALOHA: Robot = {"name": "aloha", "optional_cameras": WRISTS}
DROID: Robot = {"name": "droid"}
LIBERO: Robot = {"name": "libero"}
LIBERO_DELTA = LIBERO | {"delta": True}
FAST_DROID = DROID | {"cameras": {"exterior_image_1_left": "base_0_rgb", "wrist_image_left": "wrist_0_rgb"}}
ALOHA_SIM = ALOHA | {
    "cameras": {
        "cam_high": "base_0_rgb",
        "top": "base_0_rgb",  # in its dataset
        "cam_left_wrist": "left_wrist_0_rgb",
        "cam_right_wrist": "right_wrist_0_rgb",
    },
    "delta": False,
    "default_prompt": "Transfer cube",
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """One config of openpi.

    Attributes:
        kind: the family of the model.
        robot: the robot's adapter, as `make_robot` takes it.
        asset_id: the name of its norm stats.
        action_horizon, action_dim, max_token_len, image_keys: of `ModelConfig`. The cameras are in the order in which
            the config's data has them: in π0-FAST's LIBERO configs that of π0, so that the wrist comes second.
        lora: the experts that it trains by LoRA.
        state_in_prompt: whether π0.5's prompt has the state (openpi `discrete_state_input`).
    """

    kind: str
    robot: Robot
    asset_id: str
    action_horizon: int = 50
    action_dim: int = 32
    max_token_len: int = 48
    image_keys: tuple[str, ...] = CAMERAS
    lora: tuple[str, ...] = ()
    state_in_prompt: bool = True

    @property
    def normalization(self) -> str:
        """The normalization mode; openpi's follows from the family."""
        return FAMILIES[self.kind].normalization

    def misfits(self, model: ModelConfig, assumed: Collection[str] = ()) -> list[str]:
        """How the model differs from the preset's, in fields that are not only assumed. Sizes do not matter."""
        pairs = {name: (getattr(model, name), getattr(self, name)) for name in FIELDS if name not in assumed}
        pairs = {"kind": (model.kind, self.kind)} | pairs
        return [f"{name} is {found!r}, not {own!r}" for name, (found, own) in pairs.items() if found != own]

    def apply(self, assets: Assets, name: str) -> Assets:
        """The assets completed by the preset `name`. Raises LayoutError where they say otherwise."""
        wrong = self.misfits(assets.model, assets.assumed)
        for field in ("robot", "normalization"):
            found, own = getattr(assets, field), getattr(self, field)
            wrong += [] if found in (None, own) else [f"{field} is {found!r}, not {own!r}"]
        if wrong:
            raise LayoutError(f"the checkpoint does not fit the preset {name!r}: its {'; its '.join(wrong)}")
        return dataclasses.replace(
            assets,
            model=dataclasses.replace(assets.model, **{field: getattr(self, field) for field in FIELDS}),
            robot=dict(self.robot),
            normalization=self.normalization,
            state_in_prompt=self.state_in_prompt,
            assumed=(),
        )


def get_preset(name: str) -> Preset:
    """The preset of a name. Raises ConfigError for an unknown one, and for a config of openpi that cannot be run."""
    if name in UNSUPPORTED:
        raise ConfigError(f"openpi's config {name!r} has no preset: {UNSUPPORTED[name]}")
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def fitting_presets(model: ModelConfig, assumed: Collection[str], asset_ids: Collection[str] = ()) -> list[str]:
    """The names of the presets that a checkpoint may have been trained with, by all that its files say.

    `assumed` are the fields of its config that they do not say, `asset_ids` the names of its norm stats.
    """
    return [
        name
        for name, preset in PRESETS.items()
        if not preset.misfits(model, assumed)
        and set(preset.lora) == set(lora_of(model))
        and (not asset_ids or preset.asset_id in asset_ids)
    ]


def describe_assumed(model: ModelConfig, assumed: Collection[str]) -> str:
    """The fields that are assumed, and their values, as text."""
    return ", ".join(f"{name} {getattr(model, name)}" for name in assumed)


TEXT = {"pi0": 48, "pi05": 200, "pi0_fast": 250}  # tokens
LIBERO_ASSET = "physical-intelligence/libero"
_LIBERO = {
    "pi0": Preset("pi0", LIBERO_DELTA, LIBERO_ASSET),
    "pi05": Preset("pi05", LIBERO, LIBERO_ASSET, 10, max_token_len=TEXT["pi05"], state_in_prompt=False),
    "pi0_fast": Preset("pi0_fast", LIBERO_DELTA, LIBERO_ASSET, 10, 7, 180),
}


def _aloha(kind: str, prompt: str | None = None) -> Preset:
    robot = ALOHA if prompt is None else ALOHA | {"default_prompt": prompt}
    return Preset(kind, robot, "trossen", max_token_len=TEXT[kind])


def _libero(kind: str, lora: tuple[str, ...] = ()) -> Preset:
    return dataclasses.replace(_LIBERO[kind], lora=lora)


def _droid(kind: str, horizon: int, text: int | None = None, *, action_dim: int = 32, delta: bool = False) -> Preset:
    """DROID: joint velocities, or with `delta` joint positions relative to the state."""
    fast = FAMILIES[kind].action_tokens
    robot = (FAST_DROID if fast else DROID) | ({"delta": True} if delta else {})
    dims = 8 if fast else action_dim
    return Preset(kind, robot, "droid", horizon, dims, text or TEXT[kind], FAST_CAMERAS if fast else CAMERAS)


PRESETS = {
    # Inference
    "pi0_aloha": _aloha("pi0"),
    "pi05_aloha": _aloha("pi05"),
    "pi0_aloha_towel": _aloha("pi0", "fold the towel"),
    "pi0_aloha_tupperware": _aloha("pi0", "open the tupperware and put the food on the plate"),
    "pi0_droid": _droid("pi0", 10),
    "pi0_fast_droid": _droid("pi0_fast", 10),
    "pi05_droid": _droid("pi05", 15),
    # Fine-tuning
    "pi0_libero": _libero("pi0"),
    "pi0_libero_low_mem_finetune": _libero("pi0", EXPERTS),
    "pi0_fast_libero": _libero("pi0_fast"),
    "pi0_fast_libero_low_mem_finetune": _libero("pi0_fast", EXPERTS[:1]),
    "pi05_libero": _libero("pi05"),
    "pi0_aloha_pen_uncap": _aloha("pi0", "uncap the pen"),
    "pi05_aloha_pen_uncap": _aloha("pi05", "uncap the pen"),
    "pi0_fast_full_droid_finetune": _droid("pi0_fast", 16, 180, delta=True),
    "pi05_full_droid_finetune": _droid("pi05", 16, delta=True),
    "pi05_droid_finetune": _droid("pi05", 16),
    "pi0_aloha_sim": Preset("pi0", ALOHA_SIM, "lerobot/aloha_sim_transfer_cube_human"),
    # RoboArena's and PolaRiS's baselines
    "paligemma_fast_droid": _droid("pi0_fast", 15),
    "paligemma_diffusion_droid": _droid("pi0", 10, action_dim=8),
    "pi05_droid_jointpos_polaris": _droid("pi05", 15, delta=True),
    "pi0_fast_droid_jointpos_polaris": _droid("pi0_fast", 10, 180, delta=True),
    "pi0_droid_jointpos_polaris": _droid("pi0", 10, 100, delta=True),
    "pi0_droid_jointpos_100k_polaris": _droid("pi0", 10, 100, delta=True),
}

_BINS = "its action tokens are bins, which this project does not decode"
UNSUPPORTED = {
    "paligemma_binning_droid": _BINS,
    "paligemma_binning_droid_jointpos": _BINS,
    "paligemma_vq_droid": "its action tokens are those of an FSQ tokenizer, which this project does not decode",
    "paligemma_fast_specialist_droid": "it is paligemma_fast_droid with other action tokens: pass that preset and "
    "action_tokenizer='hf://KarlP/fast_droid_specialist'",
}
