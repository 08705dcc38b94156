"""What a diagnosis consists of: `Finding`, `Diagnosis`, and the causes in the order in which one hides the next."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

# From the camera to the motor: of two causes that are as likely, the one that comes first is told first, since what
# comes later may follow from it. Each with its title and what to do.
CAUSES: dict[str, tuple[str, str]] = {
    "black": (
        "a camera is black",
        "Check the camera's cable, its exposure, and that the client sends its image and not an empty array.",
    ),
    "frozen": (
        "a camera is frozen",
        "Check that the client reads a new image for every observation: drivers return the last one when they fall "
        "behind.",
    ),
    "swapped": (
        "cameras are swapped",
        "Exchange them in the client, or in the option `cameras` of the checkpoint's robot.",
    ),
    "orientation": (
        "a camera's images are rotated or mirrored",
        "Turn them in the client as the training data has them (LIBERO's and many wrist cameras are upside down).",
    ),
    "channels": (
        "a camera's colour channels are in another order",
        "OpenCV gives BGR, and policies are trained with RGB: image[..., ::-1] in the client.",
    ),
    "aspect": (
        "a camera's images have another aspect ratio",
        "Send the images as they were recorded: crop rather than squeeze, without bars; the policy pads by itself.",
    ),
    "fov": (
        "a camera sees more or less than in training",
        "Use the lens, the crop and the mounting of the training data, or train with augmentation on the new ones.",
    ),
    "brightness": (
        "a camera's images are darker or brighter than in training",
        "Fix exposure and white balance as they were at recording, light the scene alike, or train with augmentation.",
    ),
    "prompt_cut": (
        "prompts are longer than the model reads, and cut",
        "Shorten the prompts, or train with a larger model.max_token_len.",
    ),
    "prompt_unseen": (
        "prompts that training never saw",
        "Use the training data's wording to the letter, or train with several wordings.",
    ),
    "delta": (
        "absolute and relative actions are mixed up",
        "Set the option `delta` of the checkpoint's robot as in training (--robot), and convert or export again.",
    ),
    "gripper": (
        "the gripper's sign or range differs from training",
        "Convert it in the client or in the robot's adapt_state, adapt_actions and restore_actions.",
    ),
    "stats": (
        "the norm stats do not fit the data",
        "Compute them from this data with pi0-stats, in the units that the robot sends, and train with those; a "
        "checkpoint goes with the norm stats it was trained with.",
    ),
    "state": (
        "the robot's state is out of what training saw",
        "Check units, joint order, zero positions and the start pose; else record demonstrations from there.",
    ),
    "rate": (
        "the rate of control is not that of the training data",
        "Run the robot at the training data's frames per second, or resample the data to the robot's rate.",
    ),
    "horizon": (
        "the action horizon is not that of training",
        "Use the horizon that the model was trained with (--action-horizon, preset).",
    ),
    "padding": (
        "much of what was trained on is padding or standing still",
        "Use a shorter action horizon, longer episodes, or leave idle frames out (data.filters).",
    ),
    "precision": (
        "the compute dtype changes the actions",
        "Run with --dtype float32, or find the layer: pi0-parity CHECKPOINT CHECKPOINT --dtype bfloat16 --explain.",
    ),
    "steps": (
        "too few Euler steps",
        "Raise num_steps (released models use 10).",
    ),
    "ignores_images": (
        "actions do not depend on the images",
        "Check that cameras are not masked in training, that the vision tower was loaded (base_checkpoint), and train "
        "longer; a state that tells the task lets a policy ignore its images.",
    ),
    "ignores_state": (
        "actions do not depend on the state",
        "Check state_in_prompt (π0.5) and that the state was not constant or zero in training.",
    ),
    "ignores_prompt": (
        "actions do not depend on the prompt",
        "Harmless where the images tell the task. Else train on scenes in which several tasks are possible.",
    ),
    "jumps": (
        "chunks jump where one follows the other",
        "Join chunks with real-time chunking (pi0-serve --rtc), execute more of each chunk, or train longer.",
    ),
    "untrained": (
        "the policy does not predict the recorded actions",
        "Train longer; check the loss, that base_checkpoint was given, and what is frozen.",
    ),
    "latency": (
        "an action chunk takes longer than the robot has",
        "Use a GPU, bfloat16, compile=True, fewer Euler steps, or a server; request the next chunk while the last one "
        "is executed (pi0_serve.ChunkPlayer, --rtc).",
    ),
}
LEVELS = ("very likely", "likely", "possible")
VERY_LIKELY, LIKELY, POSSIBLE = range(3)
PROBES = ("ignores_images", "ignores_state", "ignores_prompt", "jumps", "untrained")  # symptoms of much else


@dataclasses.dataclass(frozen=True, eq=False)
class Finding:
    """A cause of CAUSES, how likely it is (an index of LEVELS), and what shows it.

    `images` are uint8 [H, W, 3] by caption; `ranges` rows of (label, low and high in training, low and high now).
    """

    cause: str
    level: int
    evidence: str
    images: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    ranges: list[tuple[str, float, float, float, float]] = dataclasses.field(default_factory=list)

    @property
    def title(self) -> str:
        """The cause in words."""
        return CAUSES[self.cause][0]

    @property
    def advice(self) -> str:
        """What to do."""
        return CAUSES[self.cause][1]


@dataclasses.dataclass(frozen=True, eq=False)
class Diagnosis:
    """`findings` in order of likelihood; `healthy` checks found nothing; `unjudged` is what was not checked, and why.

    `subject` says what was examined, `facts` are figures by name.
    """

    subject: str
    findings: list[Finding]
    healthy: list[str]
    unjudged: list[str]
    facts: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without images."""
        rows = [
            {"cause": f.cause, "title": f.title, "likelihood": LEVELS[f.level], "evidence": f.evidence}
            | {"advice": f.advice}
            | ({"ranges": [list(row) for row in f.ranges]} if f.ranges else {})
            for f in self.findings
        ]
        named = {"healthy": self.healthy, "not_judged": self.unjudged, "facts": self.facts}
        return {"subject": self.subject, "findings": rows} | named

    def to_text(self) -> str:
        """For a terminal."""
        lines = [self.subject, ""]
        for number, finding in enumerate(self.findings, 1):
            lines += [f"{number}. {LEVELS[finding.level]}: {finding.title}", f"   {finding.evidence}"]
            lines += [f"   What to do: {finding.advice}", ""]
        if not self.findings:
            lines += ["Nothing found.", ""]
        lines += [f"{name:<18}{value}" for name, value in self.facts.items()]
        lines += [f"{'nothing wrong':<18}{', '.join(self.healthy)}"] if self.healthy else []
        lines += [f"{'not judged':<18}{text}" for text in self.unjudged]
        return "\n".join(lines)


def ordered(findings: list[Finding]) -> list[Finding]:
    """In order of likelihood. Symptoms that something above explains are less likely causes themselves."""
    upstream = any(f.level == VERY_LIKELY and f.cause not in (*PROBES, "latency") for f in findings)
    found = [
        dataclasses.replace(f, level=POSSIBLE) if upstream and f.cause in PROBES and f.level < POSSIBLE else f
        for f in findings
    ]
    return sorted(found, key=lambda f: (f.level, list(CAUSES).index(f.cause)))
