"""The config of a training run: every field, its default and its checks."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from pi0.config import ConfigError, ModelConfig, canonical_dtype, from_dict
from pi0.datasets.mixture import SHUFFLES
from pi0.policy.rtc import RTCTraining
from pi0.tokenizers.text import PALIGEMMA

MAX_BFLOAT16_B2 = 0.99  # a second moment changes by 1 − b2 of itself, and bfloat16 has 8 bits of precision: 1/256
EVERYTHING_BUT_LORA = r"^({experts})\.(?!.*\.lora\.)"
# The fields of OptimizerConfig that only one optimizer or schedule reads.
OPTIMIZERS = {
    "adamw": ("b1", "b2", "eps", "weight_decay", "clip_norm", "moments_dtype"),
    "sgd": ("momentum", "nesterov"),
}
SCHEDULES = {"cosine": ("final_lr", "decay_steps"), "rsqrt": ("timescale",)}
SHARDING = {"n": "tensor", "k": "tensor?", "m": "tensor", "l": ""}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    """The loss = `text_weight`·CE(subtask or answer) + `fast_weight`·CE(FAST tokens) + `flow_weight`·flow matching.

    A part whose weight is 0 is not computed. The defaults are those of post-training (π0.5 paper, equation 1);
    pre-training has no flow. Raises ConfigError for impossible weights.

    Attributes:
        text_weight: of the cross-entropy of subtasks and answers.
        fast_weight: of the cross-entropy of FAST tokens.
        flow_weight: of flow matching, the paper's α.
        insulated: whether the flow's gradient stops at PaliGemma and the vision tower (knowledge insulation).
    """

    text_weight: float = 1.0
    fast_weight: float = 1.0
    flow_weight: float = 10.0
    insulated: bool = True

    def __post_init__(self) -> None:
        weights = self.weights
        _require(
            all(0 <= weight < float("inf") for weight in weights.values()) and any(weights.values()),
            f"recipe weights are {weights}; each must be 0 or positive, and one positive",
        )

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each part of the loss."""
        return {"text": self.text_weight, "fast": self.fast_weight, "flow": self.flow_weight}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The datasets of a run and how they are read. Raises ConfigError for fields that do not go together.

    Attributes:
        robot: the robot that recorded it: a name, "module:Name", or {"name": name, **options}.
        asset_id: the name of its norm stats in checkpoints.
        root: the dataset: a folder, or an address of `pi0.fetch`.
        format: of the dataset: "lerobot", "rlds", "arrayrecord", or "module:Name".
        normalization: a mode of `pi0.robots.normalize`; None: that of the model's family.
        norm_stats_from: a checkpoint, or the folder of `pi0-stats --out`, whose norm stats of `asset_id` are used; "":
            compute them from training episodes.
        tokenizer: the text tokenizer.
        action_tokenizer: the FAST tokenizer, of π0-FAST and of recipes.
        state_in_prompt: whether π0.5's prompt contains the state (openpi `discrete_state_input`).
        subtasks: a JSONL file of subtasks; "": the dataset's column, where it has one.
        questions: a JSONL file of questions and answers, which is read instead of `root`.
        validation_episodes: a list of episodes, or the fraction of all that the seed draws.
        mixture: datasets that are mixed, each as a table of the fields in which it differs from this config.
        weight: of the dataset in the mixture, where every dataset has one; None: by size.
        cache: a folder that `pi0-cache` filled, or "memory", where each worker keeps its own images.
        workers: processes that read; 0 reads in the training process.
        skip_damaged: whether damaged episodes are left out, instead of raising.
        filters: which frames are trained and validated on, as options of `pi0.datasets.filters.FilteredDataset`.
        augment: whether training images are augmented.
    """

    robot: str | Mapping[str, Any]
    asset_id: str
    root: str = ""
    format: str = "lerobot"
    normalization: str | None = None
    norm_stats_from: str = ""
    tokenizer: str = PALIGEMMA
    action_tokenizer: str = ""
    state_in_prompt: bool = True
    subtasks: str = ""
    questions: str = ""
    validation_episodes: tuple[int, ...] | float = ()
    mixture: tuple[Mapping[str, Any], ...] = ()
    weight: float | None = None
    cache: str = ""
    workers: int = 4
    skip_damaged: bool = False
    filters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    augment: bool = True

    def __post_init__(self) -> None:
        _require(bool(self.asset_id), "data.asset_id is empty; it names the norm stats in checkpoints")
        _require(self.workers >= 0, f"data.workers is {self.workers}; it must be 0 or positive")
        _require(self.weight is None or self.weight > 0, f"data.weight is {self.weight}; it must be positive")
        _require(
            len({source.weight is None for source in self.sources}) == 1,
            "data.mixture gives some of its datasets a weight; give all of them one, or none",
        )

    @property
    def sources(self) -> tuple[DataConfig, ...]:
        """The config of each dataset: the tables of `mixture` merged over this one, or this one alone."""
        if not self.mixture:
            return (self,)
        for i, table in enumerate(self.mixture):
            _require("mixture" not in table, f"data.mixture[{i}] has a mixture of its own; list its datasets instead")
        base = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"mixture": ()}
        return tuple(from_dict(DataConfig, base | dict(t), f"data.mixture[{i}]") for i, t in enumerate(self.mixture))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and its learning rate, which decays after a linear warmup; the defaults are openpi's.

    Attributes:
        name: "adamw", or "sgd" with momentum, without clipping or weight decay, as openpi has it.
        schedule: "cosine", or "rsqrt": `peak_lr` · sqrt(`timescale` / (`timescale` + steps after warmup)).
        peak_lr: the learning rate after warmup.
        final_lr: the learning rate at the end of the cosine decay and after it.
        warmup_steps: steps of warmup.
        decay_steps: the step at which the cosine decay ends, warmup included (openpi: 30,000, however long it trains);
            None: the last step of training.
        timescale: of "rsqrt", in steps.
        b1, b2, eps: of Adam.
        momentum, nesterov: of SGD.
        weight_decay: of AdamW: decoupled, of all parameters.
        clip_norm: of AdamW: the largest global norm of the gradient.
        moments_dtype: the dtype Adam's moments are kept in, "float32" or "bfloat16".
    """

    name: str = "adamw"
    schedule: str = "cosine"
    peak_lr: float = 2.5e-5
    final_lr: float = 2.5e-6
    warmup_steps: int = 1000
    decay_steps: int | None = None
    timescale: float = 10_000.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-10
    clip_norm: float = 1.0
    moments_dtype: str = "float32"

    def __post_init__(self) -> None:
        for field, known in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
            value = getattr(self, field)
            _require(value in known, f"optimizer.{field} is {value!r}; it must be one of {', '.join(known)}")
        self._check_unused()
        _require(self.timescale > 0, f"optimizer.timescale is {self.timescale}; it must be positive")
        _require(
            self.decay_steps is None or self.decay_steps > self.warmup_steps,
            f"optimizer.decay_steps is {self.decay_steps}; it must be more than the {self.warmup_steps} of warmup",
        )
        object.__setattr__(self, "moments_dtype", canonical_dtype(self.moments_dtype, "optimizer.moments_dtype"))
        _require(
            self.moments_dtype == "float32" or self.b2 <= MAX_BFLOAT16_B2,
            f"optimizer.b2 is {self.b2}; with moments_dtype bfloat16 it must be at most {MAX_BFLOAT16_B2}",
        )

    def _check_unused(self) -> None:
        """Raise ConfigError for fields that are not at their default and that this optimizer does not read."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        others = [f for name, fields in OPTIMIZERS.items() if name != self.name for f in fields]
        others += [f for name, fields in SCHEDULES.items() if name != self.schedule for f in fields]
        for field in others:
            _require(
                getattr(self, field) == defaults[field],
                f"optimizer.{field} is {getattr(self, field)!r}; {self.name} with a {self.schedule} schedule has none",
            )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The number of devices, in PyTorch of processes, along each mesh axis; one may be -1: all that remain.

    Attributes:
        data: devices with their own rows of the batch.
        fsdp: devices with their own rows of the batch and their own part of parameters and optimizer state.
        tensor: devices with their own attention heads and part of the MLPs; in JAX.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        _require(
            all(n >= 1 or n == -1 for n in sizes.values()) and list(sizes.values()).count(-1) <= 1,
            f"mesh is {sizes}; each must be at least 1, and one may be -1: all devices that remain",
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The config of a training run; the defaults are openpi's fine-tuning. Raises ConfigError for what cannot run.

    Attributes:
        model: the model.
        data: its datasets.
        seed: of initialization, data order, noise and flow times.
        shuffle: of the frames of a pass, one of `pi0.datasets.mixture.SHUFFLES`; recorded configs without it have
            "permutation", which takes 8 bytes of memory per frame in every worker.
        base_checkpoint: any checkpoint that `convert.checkpoints` opens, PaliGemma's too; "": fresh parameters.
        optimizer: the optimizer and its schedule.
        recipe: the weights of π0.5's losses; None: flow matching, or π0-FAST's cross-entropy, alone.
        rtc: the delays of real-time chunking that the model is trained for; None: none.
        freeze: a regular expression, searched in parameter names; "lora": all of the experts but LoRA; "": nothing.
        frozen_dtype: the dtype of frozen parameters.
        param_dtype: the dtype of trained parameters, their moments and average. float32 keeps master weights, whatever
            dtype the model computes in; bfloat16 loses updates that are smaller than its rounding, and is here to
            compare with.
        ema_decay: of the moving average of the parameters; None: no moving average.
        batch_size: rows of a step, over all devices.
        accumulate: micro-batches of a step, computed one after the other.
        mesh: the device mesh.
        sharding: a mesh axis for each axis of the parameters (`pi0_jax.training.sharding`); in JAX.
        steps: training steps.
        log_every, save_every: steps between lines of the log, and between checkpoints.
        eval_every: steps between validations; 0: none.
        keep_checkpoints: how many of the newest checkpoints stay.
        keep_best: whether the one of the lowest validation loss stays too, of those with a validation at their step.
        keep_every: those of every so many steps stay too; 0: none.
        export_every: steps between checkpoints of JAX that are exported to PyTorch and compared with the export, as the
            last one is; they stay too; 0: none.
        wandb: the project in W&B; "": none.
    """

    model: ModelConfig
    data: DataConfig
    seed: int = 0
    shuffle: str = "feistel"
    base_checkpoint: str = ""
    optimizer: OptimizerConfig = OptimizerConfig()
    recipe: RecipeConfig | None = None
    rtc: RTCTraining | None = None
    freeze: str = ""
    frozen_dtype: str = "float32"
    param_dtype: str = "float32"
    ema_decay: float | None = 0.99
    batch_size: int = 32
    accumulate: int = 1
    mesh: MeshConfig = MeshConfig()
    sharding: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(SHARDING))
    steps: int = 30_000
    log_every: int = 100
    eval_every: int = 1000
    save_every: int = 1000
    keep_checkpoints: int = 2
    keep_best: bool = True
    keep_every: int = 0
    export_every: int = 0
    wandb: str = ""

    def __post_init__(self) -> None:
        if self.data.normalization is None:
            data = dataclasses.replace(self.data, normalization=self.model.family.normalization)
            object.__setattr__(self, "data", data)
        _require(self.shuffle in SHUFFLES, f"shuffle is {self.shuffle!r}; it must be one of {', '.join(SHUFFLES)}")
        for name in ("batch_size", "accumulate", "steps", "log_every", "save_every", "keep_checkpoints"):
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("eval_every", "keep_every", "export_every"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must be 0 or positive")
        _require(
            self.export_every % self.save_every == 0,
            f"export_every is {self.export_every}; it must be a multiple of save_every, {self.save_every}: checkpoints "
            "are exported",
        )
        _require(
            0 <= self.optimizer.warmup_steps < self.steps,
            f"optimizer.warmup_steps is {self.optimizer.warmup_steps}; it must be less than the {self.steps} steps",
        )
        for name in ("frozen_dtype", "param_dtype"):
            object.__setattr__(self, name, canonical_dtype(getattr(self, name), name))
        decay = self.ema_decay
        _require(decay is None or 0 <= decay < 1, f"ema_decay is {decay}; it must be from 0 to below 1, or None")
        self._check_recipe()
        self._check_rtc()
        _ = self.freeze_pattern

    def _check_recipe(self) -> None:
        """Raise ConfigError where the data and the recipe do not go with each other or with the model."""
        recipe, family = self.recipe, self.model.family
        _require(recipe is None or family.recipe, f"a recipe is π0.5's; the model's kind is {self.model.kind}")
        for source in self.data.sources:
            _require(
                recipe is None or not recipe.fast_weight or bool(source.action_tokenizer),
                "recipe.fast_weight needs data.action_tokenizer, of the FAST tokens (pi0-fit-fast makes one)",
            )
            _require(
                recipe is not None or not (source.subtasks or source.questions),
                "data.subtasks and data.questions are trained on by a recipe only, and recipe is None",
            )
            _require(
                source.state_in_prompt or (family.prompt == "state" and recipe is None),
                "data.state_in_prompt is False, which is for π0.5 without a recipe only",
            )

    def _check_rtc(self) -> None:
        """Raise ConfigError where the model cannot be trained for the delays."""
        rtc, horizon = self.rtc, self.model.action_horizon
        flow = self.recipe is None or self.recipe.flow_weight > 0
        _require(rtc is None or not self.model.family.action_tokens, f"rtc is for flow matching, not {self.model.kind}")
        _require(rtc is None or flow, "rtc is of the flow matching loss, and recipe.flow_weight is 0")
        _require(
            rtc is None or rtc.max_delay < horizon,
            f"rtc.max_delay is {rtc and rtc.max_delay}; it must be less than the {horizon} actions of action_horizon",
        )

    @property
    def freeze_pattern(self) -> str:
        """The regular expression of the parameters that are frozen, to be searched in their dotted names.

        "lora" freezes all of the experts that have low-rank updates but these, as openpi's `get_freeze_filter`: the
        vision tower and the projections are trained. Raises ConfigError for what is no regular expression.
        """
        if self.freeze == "lora":
            experts = [name for name, expert in self.model.experts.items() if expert.lora_rank]
            _require(bool(experts), "freeze is 'lora', but no expert of the model has a lora_rank")
            return EVERYTHING_BUT_LORA.format(experts="|".join(experts))
        try:
            re.compile(self.freeze)
        except re.error as error:
            raise ConfigError(f"freeze is {self.freeze!r}, which is no regular expression: {error}") from error
        return self.freeze

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; `from_dict` reads them back to an equal config."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The config of `to_dict`'s values, of version 0.1 too. Raises ConfigError that names the dotted field."""
        if "model" in values:
            values = {**values, "model": ModelConfig.from_dict(values["model"])}
        return from_dict(cls, {"shuffle": "permutation", **values})
