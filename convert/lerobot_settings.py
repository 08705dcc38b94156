"""The settings of LeRobot 0.6.1's policies: those read, those that change no action, those of one supported value."""

from __future__ import annotations

import re
from typing import Any

# Settings of config.json. READ are those that the functions below use; INERT change no action: they are about training,
# the hub, the machine, or how many actions of a chunk are executed; of the others, one value only is supported.
READ = {
    *("type", "input_features", "output_features", "paligemma_variant", "action_expert_variant", "dtype"),
    *("chunk_size", "max_state_dim", "max_action_dim", "num_inference_steps", "num_steps", "min_period", "max_period"),
    *("image_resolution", "resize_imgs_with_padding", "empty_cameras", "tokenizer_max_length", "max_action_tokens"),
    *("max_decoding_steps", "text_tokenizer_name", "action_tokenizer_name", "normalization_mapping"),
    *("use_relative_actions", "relative_exclude_joints", "action_feature_names", "proj_width"),
}
INERT = re.compile(
    r"optimizer_\w+|scheduler_\w+|time_sampling_\w+|freeze_vision_encoder|train_\w+|gradient_checkpointing|compile_\w+|"
    r"device|use_peft|push_to_hub|repo_id|private|tags|license|pretrained_\w+|n_action_steps|use_kv_cache|use_cache|"
    r"attention_implementation"
)
ONLY: dict[str, tuple[Any, str]] = {
    "n_obs_steps": (1, "these models see one observation"),
    "use_amp": (False, "autocast rounds elsewhere; choose the compute dtype with dtype= instead"),
    "temperature": (0.0, "tokens are chosen greedily"),
    "fast_skip_tokens": (128, "FAST tokens end 128 ids before the vocabulary"),
    "validate_action_token_prefix": (True, "an answer begins with 'Action: '"),
    "adapt_to_pi_aloha": (False, "use the robot aloha, with adapt_to_pi"),
    "use_delta_joint_actions_aloha": (False, "use the robot aloha, with delta"),
}

ANY = object()
# The steps of processors in their order, and of each its settings with their only supported values.
STEPS: dict[str, dict[str, Any]] = {
    "rename_observations_processor": {"rename_map": ANY},
    "to_batch_processor": {},
    "pi0_new_line_processor": {},
    "relative_actions_processor": {"enabled": ANY, "exclude_joints": ANY, "action_names": ANY},
    "normalizer_processor": {"eps": ANY, "features": ANY, "norm_map": ANY, "normalize_observation_keys": ANY},
    "pi05_prepare_state_tokenizer_processor_step": {},
    "pi0_fast_prepare_state_tokenizer_processor_step": {},
    "tokenizer_processor": {
        "max_length": ANY,
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
        "tokenizer_name": ANY,
    },
    "action_tokenizer_processor": {"trust_remote_code": ANY, "max_action_tokens": ANY, "action_tokenizer_name": ANY},
    "device_processor": {"device": ANY, "float_dtype": None},
}
AFTER: dict[str, dict[str, Any]] = {
    "unnormalizer_processor": STEPS["normalizer_processor"],
    "absolute_actions_processor": {"enabled": ANY},
    "device_processor": STEPS["device_processor"],
}
FREE = ("to_batch_processor", "device_processor")  # whose place does not matter
# The steps of each prompt format (`Family.prompt`), in order.
PROMPT_STEPS = {
    "text": ("pi0_new_line_processor", "tokenizer_processor", "relative_actions_processor", "normalizer_processor"),
    "state": (
        *("relative_actions_processor", "normalizer_processor"),
        *("pi05_prepare_state_tokenizer_processor_step", "tokenizer_processor"),
    ),
    "fast": (
        *("relative_actions_processor", "normalizer_processor"),
        *("pi0_fast_prepare_state_tokenizer_processor_step", "tokenizer_processor", "action_tokenizer_processor"),
    ),
}
OPTIONAL = ("relative_actions_processor", "absolute_actions_processor", "rename_observations_processor")
