from __future__ import annotations

import json
from pathlib import Path

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from convert.checkpoints import detect, infer_config
from convert.layouts import LAYOUTS, LayoutError, Rule, Tensor, parameters
from convert.layouts.layout import Layout
from pi0.config import GemmaConfig, ModelConfig, VisionConfig

COUNTS = {"pi0": 3_238_048_528, "pi05": 3_353_433_872}


@st.composite
def configs(draw) -> ModelConfig:
    """Any small sizes, so that no two axes have to be equal."""
    size = st.integers(1, 5)
    heads, kv_heads, head_dim = draw(size), draw(size), 2 * draw(size)

    def gemma(depth: int) -> GemmaConfig:
        return GemmaConfig(2 * draw(size), depth, draw(size), heads * kv_heads, kv_heads, head_dim)

    vision_heads, patch, depth = draw(size), draw(size), draw(size)
    return ModelConfig(
        kind=draw(st.sampled_from(["pi0", "pi05"])),
        vision=VisionConfig(vision_heads * draw(size), draw(size), draw(size), vision_heads, patch),
        paligemma=gemma(depth),
        action_expert=gemma(depth),
        vocab_size=draw(size),
        image_resolution=(patch * draw(size), patch * draw(size)),
        action_dim=draw(size),
    )


def random_bytes(shape: tuple[int, ...], dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """Any bits, NaNs with payloads too."""
    count = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(rng.bytes(count), dtype).reshape(shape)


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("kind", ["pi0", "pi05", "pi0_lora"])
def test_full_size_openpi_names_and_shapes(kind: str):
    names = json.loads((Path(__file__).parents[1] / "layouts" / f"openpi_jax_{kind}.json").read_text())
    config = ModelConfig.variant(kind)
    assert LAYOUTS["openpi_jax"].shapes(config) == {name: tuple(shape) for name, shape in names.items()}
    for layout in LAYOUTS.values():
        if kind in COUNTS:
            assert sum(int(np.prod(s)) for s in layout.shapes(config).values()) == COUNTS[kind]


@pytest.mark.parametrize("variant", ["pi0", "pi05", "pi0_small", "pi0_lora", "tiny", "tiny_pi05", "tiny_lora"])
def test_tables_are_the_models(variant: str):
    """Names and shapes of the real modules, without allocating a weight."""
    from flax import nnx

    import pi0_jax.loading
    import pi0_torch.loading

    config = ModelConfig.variant(variant)
    state = nnx.to_pure_dict(nnx.state(pi0_jax.loading.abstract_model(config)))
    in_jax = {name: leaf.shape for name, leaf in pi0_jax.loading.flatten(state).items()}
    assert in_jax == {name: p.shape for name, p in parameters(config).items()}
    module = pi0_torch.loading.abstract_model(config)
    in_torch = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    assert in_torch == LAYOUTS["pi0_torch"].shapes(config)
    # Nothing is shared and nothing is a buffer: as many parameters as names.
    assert len(list(module.parameters())) == len(in_torch) and not list(module.buffers())
    if variant in COUNTS:
        assert sum(p.numel() for p in module.parameters()) == COUNTS[variant]


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_no_parameter_is_unused(kind: str):
    """Full-size: every parameter has a gradient from the outputs, found on the meta device without computing one."""
    import torch

    import pi0_torch

    module = pi0_torch.loading.abstract_model(ModelConfig.variant(kind, remat="none"))
    config = module.config
    with torch.device("meta"):
        observation = pi0_torch.Observation(
            images={key: torch.empty(1, *config.image_resolution, 3) for key in config.image_keys},
            image_masks={key: torch.empty(1, dtype=torch.bool) for key in config.image_keys},
            state=torch.empty(1, config.action_dim),
            tokenized_prompt=torch.empty(1, config.max_token_len, dtype=torch.int64),
            tokenized_prompt_mask=torch.empty(1, config.max_token_len, dtype=torch.bool),
        )
        actions, time = torch.empty(1, config.action_horizon, config.action_dim), torch.empty(1)
    stages: dict[str, torch.Tensor] = {}
    module.compute_loss(observation, actions, actions, time, stages)
    (stages["prefix_out"].float().sum() + stages["velocity"].sum()).backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []


def test_no_two_parameters_share_memory():
    import pi0_torch

    module = pi0_torch.Pi0(ModelConfig.variant("tiny"))
    assert len({p.untyped_storage().data_ptr() for p in module.parameters()}) == len(module.state_dict())


@pytest.mark.parametrize("name", list(LAYOUTS))
@hypothesis.given(config=configs(), seed=st.integers(0, 99), half=st.booleans())
@hypothesis.settings(max_examples=25, deadline=None)
def test_there_and_back_returns_every_byte(name: str, config: ModelConfig, seed: int, half: bool):
    layout, rng, dtype = LAYOUTS[name], np.random.default_rng(seed), np.dtype(ml_dtypes.bfloat16 if half else "float32")
    ours = {n: Tensor.of(random_bytes(p.shape, dtype, rng)) for n, p in parameters(config).items()}
    theirs = layout.from_ours(config, ours)
    assert {n: t.shape for n, t in theirs.items()} == layout.shapes(config)
    stored = {n: Tensor.of(t.read(())) for n, t in theirs.items()}
    assert all(stored[n].shape == t.shape for n, t in theirs.items())
    back = layout.to_ours(config, stored)
    for n, parameter in parameters(config).items():
        whole = ours[n].read(())
        assert same_bytes(back[n].read(()), whole), n
        for layer in range(parameter.shape[0]) if parameter.axes[0] == "l" else ():  # alone, or part of the whole
            assert same_bytes(back[n].read((layer,)), whole[layer]), n
    for n, rule in ((r.theirs, r) for r in layout.rules_for(config.kind)):
        for layer in range(theirs[n].shape[0]) if rule.groups[0] == ("l",) else ():
            assert same_bytes(theirs[n].read((layer,)), stored[n].read((layer,))), n


@hypothesis.given(config=configs())
@hypothesis.settings(max_examples=25, deadline=None)
def test_sizes_follow_from_shapes(config: ModelConfig):
    side = config.image_resolution[0]
    shapes = LAYOUTS["openpi_jax"].shapes(
        ModelConfig.from_dict(config.to_dict() | {"image_resolution": [side, side], "dtype": "bfloat16"})
    )
    layout, kind, lora = detect(shapes)
    found = infer_config(layout, kind, shapes, lora)
    assert (layout.name, found.image_resolution) == ("openpi_jax", (side, side))
    for field in ("kind", "vision", "paligemma", "action_expert", "vocab_size", "action_dim"):
        assert getattr(found, field) == getattr(config, field), field


def test_sizes_that_do_not_follow_are_asked_for():
    shapes = LAYOUTS["pi0_torch"].shapes(ModelConfig.variant("tiny"))
    with pytest.raises(LayoutError, match="config"):
        infer_config(LAYOUTS["pi0_torch"], "pi0", shapes)


@pytest.mark.parametrize("name", list(LAYOUTS))
@pytest.mark.parametrize("variant", ["tiny", "tiny_pi05"])
def test_a_layout_is_found_by_its_names(name: str, variant: str):
    config = ModelConfig.variant(variant)
    layout, kind, lora = detect(LAYOUTS[name].shapes(config))
    assert (layout.name, kind, lora) == (name, config.kind, ())


def test_foreign_names():
    with pytest.raises(LayoutError, match=r"bert\.embeddings"):
        detect({"bert.embeddings": (1, 2)})


def test_positions_of_no_square_image_are_named():
    shapes = LAYOUTS["openpi_jax"].shapes(ModelConfig.variant("tiny"))  # images of 28 x 42 pixels
    with pytest.raises(LayoutError, match=r"PaliGemma/img/pos_embedding holds 6 positions.*config="):
        infer_config(LAYOUTS["openpi_jax"], "pi0", shapes)


def test_disagreeing_shapes_name_both_tensors():
    config = ModelConfig.variant("tiny")
    shapes = LAYOUTS["openpi_jax"].shapes(config)
    shapes["action_out_proj/kernel"] = (20, 9)
    with pytest.raises(LayoutError, match=r"action_out_proj/bias.*9|action_out_proj/kernel.*9"):
        infer_config(LAYOUTS["openpi_jax"], "pi0", shapes)


def test_a_table_with_a_hole_or_a_double_is_refused():
    table = LAYOUTS["pi0_jax"].rules
    for rules in (table[1:], (*table, Rule(table[0].ours, "twice", table[0].axes))):
        with pytest.raises(LayoutError, match=table[0].ours):
            Layout("broken", rules).rules_for("pi0")


def test_parts_of_one_tensor_must_share_a_dtype():
    config = ModelConfig.variant("tiny")
    ours = {n: Tensor.of(np.zeros(p.shape, np.float32)) for n, p in parameters(config).items()}
    name = "paligemma.layers.mlp.gate.kernel"
    ours[name] = Tensor.of(ours[name].read(()).astype(np.float64))
    with pytest.raises(LayoutError, match="gating_einsum"):
        LAYOUTS["openpi_jax"].from_ours(config, ours)
