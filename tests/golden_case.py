"""openpi's own numbers for small models (its JAX code, random weights), and what ours must reach against them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from pi0 import numerics
from pi0.config import ModelConfig
from pi0.observation import Observation

CASES = ("pi0", "pi05")
LORA = "pi0_lora"
FAST = "pi0_fast"
FOLDER = Path(__file__).parent / "golden"
OUTPUTS = (
    "prefix_tokens",
    "suffix_tokens",
    "prefix_out",
    "suffix_out",
    "velocity",
    "pre_logits",
    "loss",
    "actions_3_steps",
    "actions_10_steps",
)


@dataclasses.dataclass(frozen=True)
class GoldenCase:
    """One case: where its openpi checkpoint lies, its config and inputs."""

    name: str

    @property
    def checkpoint(self) -> Path:
        return FOLDER / self.name / "checkpoint"

    def config(self, dtype: str) -> ModelConfig:
        values = json.loads((FOLDER / self.name / "config.json").read_text())
        if values["lora"] is not None:
            lora = {"lora_rank": values["lora"]["rank"], "lora_alpha": values["lora"]["alpha"]}
            values |= {expert: values[expert] | lora for expert in ("paligemma", "action_expert")}
        fields = {f.name for f in dataclasses.fields(ModelConfig)}
        return ModelConfig.from_dict({k: v for k, v in values.items() if k in fields} | {"dtype": dtype})

    def inputs(self) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray]:
        """Observation, actions, noise, time."""
        data = dict(np.load(FOLDER / self.name / "inputs.npz"))
        actions, noise, time = (data.pop(key) for key in ("actions", "noise", "time"))
        return Observation.from_dict(data, self.config("float32")), actions, noise, time

    def outputs(self, dtype: str) -> dict[str, np.ndarray]:
        """The reference's outputs; of the prefix only what is valid."""
        return self.valid(dict(np.load(FOLDER / self.name / f"outputs_{dtype}.npz")))

    def gradients(self) -> dict[str, np.ndarray]:
        """The reference's gradients of the mean loss, by openpi's names, float32."""
        return dict(np.load(FOLDER / self.name / "grads_float32.npz"))

    def valid(self, outputs: dict[str, np.ndarray], dtype: type = np.float32) -> dict[str, np.ndarray]:
        """Outputs by name, with masked prefix positions, which carry no meaning, left out."""
        observation = self.inputs()[0]
        tokens = self.config("float32").image_tokens
        masks = [np.repeat(m[:, None], tokens, axis=1) for m in observation.image_masks.values()]
        valid = np.concatenate([*masks, observation.tokenized_prompt_mask], axis=1)
        arrays = {name: np.asarray(outputs[name], dtype) for name in OUTPUTS if name in outputs}
        return {  # π0-FAST has no use for the last token
            name: array[valid[:, : array.shape[1]]] if name.startswith("pre") else array
            for name, array in arrays.items()
        }

    def check_tokens(self, tokens: np.ndarray, dtype: str) -> None:
        """The tokens that openpi decoded, to each row's first EOS; zeros after it."""
        expected = np.load(FOLDER / self.name / f"outputs_{dtype}.npz")["sampled_tokens"]
        ended = np.cumsum(expected == numerics.EOS_TOKEN, axis=1) - (expected == numerics.EOS_TOKEN) > 0
        np.testing.assert_array_equal(tokens, np.where(ended, 0, expected))


def check_float32(case: GoldenCase, outputs: dict[str, np.ndarray]) -> None:
    """Within 1e-5 of the reference's largest value: float32 rounding through a whole model is about 1e-6."""
    reference = case.outputs("float32")
    for name in reference:
        value = case.valid(outputs)[name]
        error = np.abs(value - reference[name]).max() / np.abs(reference[name]).max()
        assert error <= 1e-5, f"{case.name} {name}: {error:.2e}"


def check_float64(case: GoldenCase, exact: dict[str, np.ndarray], rounded: dict[str, np.ndarray]) -> None:
    """openpi's float32 is as far from our float64 as our float32 is, in relative L2: the distance is its rounding.

    Its sums have another order, so its error is another one of the same size: measured are 0.76 to 1.08 times ours, of
    4e-8 (π0-FAST's loss) to 6e-6 (π0's velocity, by the float32 angle of its flow time); 1.5 times is allowed.
    """
    reference = case.valid(dict(np.load(FOLDER / case.name / "outputs_float32.npz")), np.float64)
    exact, rounded = case.valid(exact, np.float64), case.valid(rounded, np.float64)
    for name in reference:
        theirs, ours = (np.linalg.norm(x[name] - exact[name]) for x in (reference, rounded))
        assert theirs <= 1.5 * ours, f"{case.name} {name}: openpi's {theirs:.2e}, ours {ours:.2e}"
        assert ours <= 1e-5 * np.linalg.norm(exact[name]), f"{case.name} {name}: {ours:.2e}"


def check_bfloat16(case: GoldenCase, outputs: dict[str, np.ndarray]) -> None:
    """As near to float32 as openpi's own bfloat16, with half as much again for other, equally good roundings."""
    exact, theirs = case.outputs("float32"), case.outputs("bfloat16")
    for name in exact:
        value = case.valid(outputs)[name]
        own, allowed = (np.linalg.norm(x - exact[name]) / np.linalg.norm(exact[name]) for x in (value, theirs[name]))
        # Suffix tokens are float32 in both, so openpi's error is 0 there: float32 rounding is allowed.
        assert own <= max(1.5 * allowed, 1e-6), f"{case.name} {name}: {own:.2e}, openpi's {allowed:.2e}"


def check_gradients(case: GoldenCase, ours: dict[str, Tensor], only: str = "") -> None:
    """Relative L2 ≤ 2e-5 per parameter. One whose gradient is under 1e-4 of the whole is measured against that: a key
    bias has no gradient in exact arithmetic, since a softmax does not see a constant, only rounding."""
    reference = case.gradients()
    found = LAYOUTS["openpi_jax"].from_ours(case.config("float32"), ours)
    assert found.keys() == reference.keys()
    floor = 1e-4 * np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in reference.values()))
    for name, expected in reference.items():
        if only not in name:
            continue
        error = np.linalg.norm(found[name].read(()) - expected) / max(np.linalg.norm(expected), floor)
        assert error <= 2e-5, f"{case.name} {name}: {error:.2e}"
