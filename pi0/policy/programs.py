"""The programs of an exported sampler: their names, inputs and outputs.

One program samples (`sample`), or several do: `prefix` reads images and prompt into keys and values, `decode` reads one
written token after them, and `denoise` integrates from noise to actions. Axes: see `AXES`.
"""

from __future__ import annotations

import dataclasses

from pi0.config import ModelConfig
from pi0.policy.rtc import RTC

# Axes whose size a call decides. `prefix` are the tokens of cameras and prompt; `cached` those, and of a model that
# writes text the places of its tokens after them.
AXES = ("batch", "cameras", "prompt", "prefix", "cached")
DTYPES = ("float32", "int32", "uint8", "bool")


@dataclasses.dataclass(frozen=True)
class Array:
    """An input or output: its name, dtype, and shape of numbers and names of `AXES`."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """The inputs and outputs of a program, in order."""

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of calls that an export is made for. Raises ValueError for what no call can have.

    Attributes:
        batch: the smallest and the largest batch.
        cameras: the fewest and the most cameras; with a fixed number all are there, masked where they are missing.
        prompts: the lengths that prompts are cut to, ascending.
    """

    batch: tuple[int, int]
    cameras: tuple[int, int]
    prompts: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("batch", "cameras"):
            least, most = getattr(self, name)
            if not 0 < least <= most:
                raise ValueError(f"{name} is {least}-{most}; it must be a positive number, or two ascending ones")
        if not self.prompts or list(self.prompts) != sorted(set(self.prompts)) or self.prompts[0] < 1:
            raise ValueError(f"prompts are {self.prompts}; they must be positive, ascending lengths")

    def ranges(self, config: ModelConfig, room: int) -> dict[str, tuple[int, int]]:
        """The least and the most of each of `AXES`; `room` as in `programs`."""
        least, most = (self.cameras[i] * config.image_tokens + self.prompts[-i] for i in (0, 1))
        ranges = {"batch": self.batch, "cameras": self.cameras, "prompt": (self.prompts[0], self.prompts[-1])}
        return ranges | {"prefix": (least, most), "cached": (least + room, most + room)}


def programs(
    config: ModelConfig, sizes: Sizes, *, rtc: RTC | None = None, room: int = 0, split: bool = False
) -> dict[str, Program]:
    """The programs of a model, by name. Axes of one size have it as a number.

    `room`: how many tokens are written after the prompt, 0 of a model that samples actions alone. It has one program,
    or with `split` two; one that writes tokens always has several.
    """
    fixed = {name: least for name, (least, most) in sizes.ranges(config, room).items() if least == most}

    def array(name: str, dtype: str, *shape: int | str) -> Array:
        return Array(name, dtype, tuple(fixed.get(n, n) if isinstance(n, str) else n for n in shape))

    def cache(axis: str, prefix: str = "") -> tuple[Array, Array]:
        gemma = config.paligemma
        shape = (gemma.depth, "batch", gemma.num_kv_heads, axis, gemma.head_dim)
        return array(f"{prefix}keys", "float32", *shape), array(f"{prefix}values", "float32", *shape)

    chunk = ("batch", config.action_horizon, config.action_dim)
    state, actions = array("state", "float32", "batch", config.state_size), array("actions", "float32", *chunk)
    noise: tuple[Array, ...] = (state, array("noise", "float32", *chunk))
    if rtc is not None:
        noise += (array("previous_actions", "float32", *chunk), array("previous_weights", "float32", *chunk))
    observed = (
        array("images", "uint8", "batch", "cameras", *config.image_resolution, 3),
        array("image_masks", "bool", "batch", "cameras"),
        array("prompt", "int32", "batch", "prompt"),
        array("prompt_mask", "bool", "batch", "prompt"),
    )
    if not (room or split):
        return {"sample": Program((*observed, *noise), (actions,))}
    logits = array("logits", "float32", "batch", config.vocab_size)
    read = (*cache("prefix"), array("seen", "bool", "batch", "prefix"))
    found = {"prefix": Program(observed, (*read, logits) if room else read)}
    cached = (*cache("cached"), array("seen", "bool", "batch", "cached"))
    if room:
        token = (array("token", "int32", "batch", 1), array("position", "int32", "batch", 1), array("slot", "int32", 1))
        found["decode"] = Program((*token, *cached), (logits, *cache("cached", "next_")))
    if not config.family.action_tokens:
        found["denoise"] = Program((*cached, *noise), (actions,))
    return found
