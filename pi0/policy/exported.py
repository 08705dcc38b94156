"""Sampling by the programs of an export, and the policy that does: NumPy, and onnxruntime for those of ONNX.

Axes: B batch, C cameras, S prefix tokens, P places of the cache, D written tokens, T action horizon, A action dim,
V vocabulary.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pi0 import numerics
from pi0.assets import Assets, AssetsError
from pi0.config import ModelConfig
from pi0.observation import Observation, ObservationError
from pi0.plugins import require_extra
from pi0.policy.manifest import ExportError, Manifest
from pi0.policy.policy import Policy
from pi0.policy.rtc import Previous
from pi0.storage import below

Arrays = dict[str, np.ndarray]


class Runner(Protocol):
    """Runs the programs of an export."""

    def run(self, program: str, inputs: Arrays, stages: bool = False) -> Arrays:
        """The outputs by name, and with `stages` those that the program has, too."""


class ExportedSampler:
    """`sample` and `sample_with_subtask` by the programs of an export, as `pi0_torch.Sampler` has them.

    Larger batches than the export takes are run in parts, and smaller ones filled up. Where cameras vary, those that
    are masked in every row are left out.
    """

    def __init__(self, manifest: Manifest, config: ModelConfig, runner: Runner):
        self.manifest, self.config, self.runner = manifest, config, runner
        self.rtc, self.subtasks, self.num_steps = manifest.rtc, manifest.subtasks, manifest.num_steps

    def sample(
        self,
        observation: Observation,
        noise: np.ndarray | None = None,
        previous: Previous | None = None,
        stages: Arrays | None = None,
    ) -> np.ndarray:
        """Normalized actions [B, T, A], float32, or of π0-FAST tokens [B, D], int32, which takes no noise.

        `stages`, where given, receives what the programs compute before.
        Raises ObservationError for what the export does not take.
        """
        return self._in_parts(self._sample, self.inputs(observation.prompt_only(), noise, previous), stages)[0]

    def sample_with_subtask(
        self,
        observation: Observation,
        noise: np.ndarray,
        subtask: np.ndarray | None = None,
        previous: Previous | None = None,
        stages: Arrays | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Write a subtask [B, D], unless it is given, and sample actions [B, T, A] that attend to it; returns both.

        Raises ValueError for an export that writes none, and ObservationError for what it does not take.
        """
        if not self.subtasks:
            raise ValueError("this export writes no subtasks")
        inputs = self.inputs(observation.prompt_only(), noise, previous)
        inputs |= {} if subtask is None else {"subtask": np.asarray(subtask, np.int32)}
        subtask, actions = self._in_parts(self._sample_with_subtask, inputs, stages)
        return subtask, actions

    def _in_parts(self, function: Callable[..., Any], inputs: Arrays, stages: Arrays | None) -> Any:
        """The results of parts of the batch, one after the other, the last one filled with its last row."""
        least, most = self.manifest.sizes.batch
        batch, parts, found = len(inputs["state"]), [], []
        for start in range(0, batch, most):
            count = min(most, batch - start)
            rows = np.minimum(np.arange(start, start + max(count, least)), batch - 1)
            own: Arrays | None = None if stages is None else {}
            results = function({name: x[rows] for name, x in inputs.items()}, own)
            parts.append([x[:count] for x in results])
            found.append({name: x[: len(x) // len(rows) * count] for name, x in (own or {}).items()})
        if stages is not None:
            stages.update({name: np.concatenate([part[name] for part in found]) for name in found[0]})
        return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))

    def _sample(self, inputs: Arrays, stages: Arrays | None) -> tuple[np.ndarray]:
        if "sample" in self.manifest.programs:
            return (self._run("sample", inputs, stages)["actions"],)
        read = self._run("prefix", inputs, stages)
        if self.config.family.action_tokens:
            skipped = self.config.format.skipped_positions
            return (self._decode(read, stages, skipped=skipped, name="decoded logits"),)
        return (self._run("denoise", inputs | read, stages)["actions"],)

    def _sample_with_subtask(self, inputs: Arrays, stages: Arrays | None) -> tuple[np.ndarray, np.ndarray]:
        read, given = self._run("prefix", inputs, stages), inputs.get("subtask")
        subtask = self._decode(read, stages, name="subtask logits", read_last=True, given=given)
        return subtask, self._run("denoise", inputs | read, stages)["actions"]

    def _decode(
        self,
        read: Arrays,
        stages: Arrays | None,
        *,
        name: str,
        skipped: int = 0,
        read_last: bool = False,
        given: np.ndarray | None = None,
    ) -> np.ndarray:
        """Tokens [B, D] after the prefix that was `read`, the likeliest each, or those that are `given`.

        `read` has the cache and the mask with their places afterwards. See `pi0_torch.models.decoding.decode`.
        """
        valid, steps = read["seen"], self.manifest.room
        (batch, start), done = valid.shape, np.zeros(len(valid), bool)
        length, places = valid.sum(1, keepdims=True), np.arange(start + steps)
        for cache in ("keys", "values"):
            read[cache] = np.pad(read[cache], [(0, 0)] * 3 + [(0, steps), (0, 0)])
        valid = np.pad(valid, [(0, 0), (0, steps)])
        tokens = np.zeros((batch, steps), np.int32) if given is None else np.asarray(given, np.int32)
        kept = np.zeros((batch, steps, self.config.vocab_size), np.float32)
        logits, count = read["logits"], int(written(tokens).sum(1).max()) if given is not None else steps

        def read_token(i: int) -> np.ndarray:
            """Read token i − 1; the logits [B, V] of token i."""
            seen = valid | (places >= start) & (places < start + i)
            token = {"token": tokens[:, i - 1, None], "position": (length + skipped + i - 1).astype(np.int32)}
            token |= {"seen": seen, "slot": np.array([start + i - 1], np.int32)}
            found = self._run("decode", token | {cache: read[cache] for cache in ("keys", "values")}, None)
            read.update(keys=found["next_keys"], values=found["next_values"])
            return found["logits"]

        i = 0
        while i < count and not done.all():
            logits = read_token(i) if i else logits
            kept[:, i] = np.where(done[:, None], 0, logits)
            if given is None:
                tokens[:, i] = np.where(done, 0, logits.argmax(1))
                done |= tokens[:, i] == numerics.EOS_TOKEN
            i += 1
        if read_last and i:
            read_token(i)
        if stages is not None:
            stages[name] = kept
        read["seen"] = np.concatenate([read["seen"], written(tokens)], axis=1)
        return tokens

    def _run(self, name: str, inputs: Arrays, stages: Arrays | None) -> Arrays:
        found = self.manifest.programs[name]
        results = self.runner.run(name, {x.name: inputs[x.name] for x in found.program.inputs}, stages is not None)
        if stages is not None:
            stages.update({stage: results[stage] for stage in found.stages if stage in results})
        return {x.name: results[x.name] for x in found.program.outputs}

    def inputs(self, observation: Observation, noise: Any, previous: Previous | None) -> Arrays:
        """The inputs of the programs. Raises ObservationError for what the export does not take."""
        if previous is not None and self.rtc is None:
            raise ObservationError("prev_chunk: the export has no real-time chunking; export it with --rtc")
        keys = self.cameras(observation)
        images = np.stack([observation.images[key] for key in keys], axis=1)
        if images.dtype != np.uint8:
            raise ObservationError(f"images are {images.dtype}; the export takes uint8, 0 to 255")
        length = self.prompt_length(observation)
        arrays = {
            "images": images,
            "image_masks": np.stack([observation.image_masks[key] for key in keys], axis=1),
            "prompt": observation.tokenized_prompt[:, :length],
            "prompt_mask": observation.tokenized_prompt_mask[:, :length],
            "state": observation.state,
        }
        if noise is not None:
            arrays["noise"] = np.asarray(noise, np.float32)
            if self.rtc is not None:
                given = Previous.none(*arrays["noise"].shape) if previous is None else previous
                arrays |= {"previous_actions": given.actions, "previous_weights": given.weights}
        return arrays

    def cameras(self, observation: Observation) -> list[str]:
        """The cameras that the programs get: those that are there in some row, and as many masked ones as needed.

        Raises ObservationError for more than the export takes.
        """
        least, most = self.manifest.sizes.cameras
        used = [key for key in self.config.image_keys if observation.image_masks[key].any()]
        if len(used) > most:
            raise ObservationError(f"{len(used)} cameras: {', '.join(used)}; the export takes at most {most}")
        filled = [key for key in self.config.image_keys if key not in used][: max(least - len(used), 0)]
        return [key for key in self.config.image_keys if key in (*used, *filled)]

    def prompt_length(self, observation: Observation) -> int:
        """The shortest length of the export that holds the prompts. Raises ObservationError where none does."""
        used, lengths = observation.tokenized_prompt_mask.any(0), self.manifest.sizes.prompts
        needed = int(np.flatnonzero(used).max(initial=-1)) + 1
        if needed > lengths[-1]:
            raise ObservationError(f"a prompt of {needed} tokens; the export takes at most {lengths[-1]}")
        return lengths[bisect.bisect_left(lengths, needed)]


def written(tokens: np.ndarray) -> np.ndarray:
    """Which tokens are text, bool [B, D]: all up to the end of text, itself included."""
    ends = tokens == numerics.EOS_TOKEN
    return np.cumsum(ends, axis=1) - ends == 0


class OnnxRunner:
    """Runs programs by onnxruntime, on `providers` (default: the CPU). Raises MissingExtraError without it."""

    def __init__(self, folder: Path, manifest: Manifest, providers: list[str] | None = None):
        require_extra("onnx", "onnxruntime")
        self._folder, self._manifest, self._providers = folder, manifest, providers or ["CPUExecutionProvider"]
        self._sessions = {name: self._open(below(folder, p.file)) for name, p in manifest.programs.items()}
        self._staged: dict[str, Any] = {}

    def _open(self, model: Path | bytes) -> Any:
        import onnxruntime

        options, disabled = onnxruntime.SessionOptions(), []
        if self._manifest.quantization or self._manifest.weights != self._manifest.dtype:
            disabled = ["ConstantFolding"]  # which would widen all weights at once
            options.add_session_config_entry("session.disable_prepacking", "1")
        if isinstance(model, bytes):
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
        source = model if isinstance(model, bytes) else str(model)
        return onnxruntime.InferenceSession(
            source, options, providers=self._providers, disabled_optimizers=disabled or None
        )

    def run(self, program: str, inputs: Arrays, stages: bool = False) -> Arrays:
        """The outputs of a program, and with `stages` of one that is the same but for more outputs."""
        found = self._manifest.programs[program]
        names = [x.name for x in found.program.outputs]
        arrays = {name: np.ascontiguousarray(x) for name, x in inputs.items()}
        results = dict(zip(names, self._sessions[program].run(names, arrays), strict=True))
        if stages and found.stages:
            if program not in self._staged:
                self._staged[program] = self._open(with_outputs(below(self._folder, found.file), found.stages))
            read = [stage for stage in found.stages if stage not in results]
            results |= dict(zip(read, self._staged[program].run(read, arrays), strict=True))
        return results


def with_outputs(file: Path, names: tuple[str, ...]) -> bytes:
    """An ONNX model, without its weights, that has these values of its graph as outputs too. Raises ExportError."""
    require_extra("export", "onnx")
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    known = {value for node in model.graph.node for value in node.output}
    if missing := [name for name in names if name not in known]:
        raise ExportError(f"{file} has no value {missing[0]!r}, a stage of its manifest; export it again")
    there = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    return model.SerializeToString()


class ExportedPolicy(Policy):
    """A policy that runs the programs of an export: `from_export`, then `infer` (see `Policy`)."""

    @classmethod
    def from_export(
        cls,
        path: str | Path,
        *,
        seed: int = 0,
        fallback: bool = False,
        subtask_every: int = 1,
        providers: list[str] | None = None,
        verify: bool = True,
        runner: Runner | None = None,
    ) -> ExportedPolicy:
        """The policy of an export to ONNX, which needs onnxruntime alone; of others with a `runner`.

        `providers` are onnxruntime's. Without `verify`, the files' checksums are not compared. Other arguments are
        those of `Policy`. Raises ExportError and AssetsError for a folder that is no whole export of a policy.
        """
        folder = Path(path).expanduser()
        manifest = Manifest.load(folder, verify)
        assets = Assets.load(folder)
        if assets is None:
            raise AssetsError(f"{folder} has no config.json; export it again")
        if runner is None and manifest.to != "onnx":
            raise ExportError(f"{folder} is an export to {manifest.to}; this runs onnx (or pass a runner)")
        made = OnnxRunner(folder, manifest, providers) if runner is None else runner
        sampler = ExportedSampler(manifest, assets.model, made)
        options: dict[str, Any] = {"seed": seed, "fallback": fallback, "subtask_every": subtask_every}
        return cls(None, assets, num_steps=manifest.num_steps, sampler=sampler, rtc=manifest.rtc, **options)

    def sample(
        self, observation: Observation, noise: np.ndarray | None, previous: Previous | None = None
    ) -> np.ndarray:
        """Normalized actions [B, T, A] from `noise` [B, T, A], or π0-FAST's tokens [B, D]."""
        return self.sampler.sample(observation, noise, previous)

    def sample_with_subtask(
        self,
        observation: Observation,
        noise: np.ndarray,
        subtask: np.ndarray | None,
        previous: Previous | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """π0.5's subtask [B, D], predicted unless it is given, and the actions [B, T, A]."""
        return self.sampler.sample_with_subtask(observation, noise, subtask, previous)
