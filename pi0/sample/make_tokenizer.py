"""Write tokenizer.model, the small tokenizer of the bundled sample, so that nothing has to be downloaded.

    python -m pi0.sample.make_tokenizer

A small substitute for PaliGemma's tokenizer: the same special ids, split digits, byte fallback and no normalization,
but 512 pieces, trained on the sentences below.
"""

from __future__ import annotations

import io
from itertools import product
from pathlib import Path

import sentencepiece

MODEL = Path(__file__).parent / "tokenizer.model"
VOCAB_SIZE = 512

METAWORLD = (
    "reach the red target",
    "push the puck to the goal",
    "open the drawer",
    "press the button from the top",
)
ACTIONS = (
    "pick up the {thing}",
    "put the {thing} in the {place}",
    "place the {thing} on the {place}",
    "move the {thing} to the left of the {place}",
    "push the {thing} to the right",
    "take the {thing} out of the {place}",
    "pour water from the {thing} into the {place}",
    "hand over the {thing} with the left gripper",
    "open the {place}",
    "close the {place} slowly",
    "press the green button next to the {place}",
    "turn on the light behind the {place}",
    "wipe the {place} with the {thing}",
    "stack the {thing} on top of the {place}",
    "fold the {thing} and put it away",
    "grasp the handle of the {thing}",
)
THINGS = ("red cube", "blue block", "cup", "yellow banana", "towel", "small screwdriver", "black bottle")
PLACES = ("bowl", "top drawer", "plate", "wooden shelf", "microwave door", "white box", "tray")


def corpus() -> list[str]:
    """The training sentences: Meta-World's instructions, tabletop instructions and prompts with a state."""
    tasks = [action.format(thing=t, place=p) for action, t, p in product(ACTIONS, THINGS, PLACES)]
    tasks = list(METAWORLD) + list(dict.fromkeys(tasks))
    states = [" ".join(str((37 * i + 61 * j) % 257 - 1) for j in range(7)) for i in range(len(tasks))]
    prompts = [f"Task: {task}, State: {state};\nAction: " for task, state in zip(tasks, states, strict=True)]
    return tasks + prompts


def train() -> bytes:
    """Train a SentencePiece model on `corpus()`; deterministic to the byte."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        split_digits=True,
        user_defined_symbols=["\n"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


if __name__ == "__main__":
    MODEL.write_bytes(train())
