"""Run a policy's folder with the real LeRobot, in its own environment (make_env.sh): actions or tokens to an npz file.

    python run_lerobot.py FOLDER SIZES FRAMES TOKENIZER OUT [DTYPE]

LeRobot has no name for small sizes: SIZES is a JSON file of a model config, to which its models are shrunk. TOKENIZER
is a SentencePiece model in place of PaliGemma's, which cannot be had without the network. FRAMES is an npz file of
frames, `prompt` and `noise`. What `from_pretrained(strict=True)` prints is in OUT, too. DTYPE is what LeRobot computes
in, instead of what `config.json` says.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import sentencepiece
import torch


def import_torchvision() -> None:
    """Import torchvision, of which only the operators are missing beside a torch without CUDA; no policy uses them."""
    libraries = []
    while True:
        try:
            import torchvision  # noqa: F401
        except RuntimeError as error:
            (name,) = re.findall(r"operator torchvision::(\w+) does not exist", str(error))
            libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
            libraries[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            for loaded in [module for module in sys.modules if module.startswith("torchvision")]:
                del sys.modules[loaded]
        else:
            break
    _kept.extend(libraries)


_kept: list[Any] = []


class Tokenizer:
    """As much of a Hugging Face tokenizer as LeRobot uses, over a SentencePiece model."""

    def __init__(self, file: str):
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=file)
        self.vocab_size, self.bos_token_id = self.pieces.vocab_size(), self.pieces.bos_id()

    def __call__(self, text: list[str], max_length: int, **options: Any) -> dict[str, torch.Tensor]:
        assert options["padding"] == "max_length" and options["padding_side"] == "right" and options["truncation"]
        ids, mask = torch.zeros(len(text), max_length, dtype=torch.int64), torch.zeros(len(text), max_length)
        for i, one in enumerate(text):
            tokens = self.pieces.encode(one, add_bos=True)[:max_length]
            ids[i, : len(tokens)], mask[i, : len(tokens)] = torch.tensor(tokens), 1
        return {"input_ids": ids, "attention_mask": mask}

    def encode(self, text: str, **_: Any) -> list[int]:
        return self.pieces.encode(text)

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.pieces.piece_to_id(token)


def set_sizes(config: Any, sizes: dict[str, Any]) -> Any:
    """The config of transformers' PaliGemma, with the sizes of a model config."""
    vision = sizes["vision"]
    config._vocab_size = config.text_config.vocab_size = config.image_token_index = sizes["vocab_size"]
    config.vision_config.image_size = sizes["image_resolution"][0]
    config.vision_config.hidden_size, config.vision_config.patch_size = vision["width"], vision["patch_size"]
    config.vision_config.intermediate_size = vision["mlp_dim"]
    config.vision_config.num_hidden_layers = vision["depth"]
    config.vision_config.num_attention_heads = vision["num_heads"]
    config.vision_config.projection_dim = config.projection_dim = sizes["paligemma"]["width"]
    return config


def shrink(module: Any, sizes: dict[str, Any]) -> None:
    """Let a policy's module make models of these sizes."""
    experts = {"gemma_2b": sizes["paligemma"], "gemma_300m": sizes["action_expert"]}
    module.get_gemma_config = lambda variant: SimpleNamespace(**(experts[variant] or sizes["paligemma"]))
    paligemma, expert = module.PaliGemmaForConditionalGenerationWithPiGemma, getattr(module, "PiGemmaForCausalLM", None)

    def make_paligemma(config: Any) -> Any:
        return paligemma(config=set_sizes(config, sizes))

    def make_expert(config: Any) -> Any:
        config.vocab_size = sizes["vocab_size"]
        return expert(config=config)

    module.PaliGemmaForConditionalGenerationWithPiGemma = make_paligemma
    if expert is not None:
        module.PiGemmaForCausalLM = make_expert


def main() -> None:
    """Load, preprocess, run, postprocess, write."""
    folder, sizes_file, frames_file, tokenizer_file, out, *dtype = sys.argv[1:]
    import_torchvision()
    torch.set_num_threads(1)
    import lerobot.processor.tokenizer_processor as tokenizers
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    tokenizer = Tokenizer(tokenizer_file)
    give = SimpleNamespace(from_pretrained=lambda *_, **__: tokenizer)
    tokenizers.AutoTokenizer, tokenizers.AutoProcessor = give, give
    config = PreTrainedConfig.from_pretrained(folder)
    cls, sizes = get_policy_class(config.type), json.loads(Path(sizes_file).read_text())
    module = sys.modules[cls.__module__]
    shrink(module, sizes)
    if hasattr(module, "AutoTokenizer"):
        module.AutoTokenizer = module.AutoProcessor = give
    config.device = "cpu"
    if dtype:
        config.dtype = dtype[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        policy = cls.from_pretrained(folder, config=config, strict=True)
    before, after = make_pre_post_processors(
        config,
        pretrained_path=folder,
        preprocessor_overrides={"device_processor": {"device": "cpu"}},
        postprocessor_overrides={},
    )
    frames = dict(np.load(frames_file))
    noise = torch.from_numpy(frames.pop("noise")) if "noise" in frames else None
    batch: dict[str, Any] = {"task": [str(prompt) for prompt in frames.pop("prompt")]}
    for name, value in frames.items():
        image = value.ndim == 4
        name = name if "." in name else f"observation.images.{name}" if image else f"observation.{name}"
        tensor = torch.from_numpy(value)
        batch[name] = tensor.permute(0, 3, 1, 2).float() / 255 if image else tensor
    batch = before(batch)
    with torch.no_grad():
        if noise is not None:
            result = after(policy.predict_action_chunk(batch, noise=noise))
        else:
            images, masks = policy._preprocess_images(batch)
            text = batch["observation.language.tokens"], batch["observation.language.attention_mask"]
            result = policy.model.sample_actions_fast_kv_cache(images, masks, *text, max_decoding_steps=16)
    np.savez(out, result=result.numpy(), printed=printed.getvalue())


if __name__ == "__main__":
    main()
