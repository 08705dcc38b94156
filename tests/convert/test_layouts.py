from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from convert.detection import detect, infer_config
from convert.layouts.layout import Layout, Rule
from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from pi0.config import KINDS, GemmaConfig, ModelConfig, VisionConfig
from pi0.parameters import LayoutError, lora_of, parameters
from pi0.variants import VARIANTS, get_variant

UNTIED = ("pi0_jax", "pi0_torch", "lerobot")  # layouts with a tensor for an output projection of its own
COUNTS = {"pi0": 3_238_048_528, "pi05": 3_353_433_872, "pi0_fast": 2_923_335_408}


@st.composite
def configs(draw) -> ModelConfig:
    """Any small sizes, so that no two axes have to be equal."""
    size = st.integers(1, 5)
    heads, kv_heads, head_dim = draw(size), draw(size), 2 * draw(size)

    def gemma(depth: int) -> GemmaConfig:
        return GemmaConfig(2 * draw(size), depth, draw(size), heads * kv_heads, kv_heads, head_dim)

    vision_heads, patch, depth = draw(size), draw(size), draw(size)
    kind = draw(st.sampled_from(KINDS))
    return ModelConfig(
        kind=kind,
        vision=VisionConfig(vision_heads * draw(size), draw(size), draw(size), vision_heads, patch),
        paligemma=gemma(depth),
        action_expert=None if kind == "pi0_fast" else gemma(depth),
        vocab_size=draw(size),
        image_resolution=(patch * draw(size), patch * draw(size)),
        action_dim=draw(size),
        state_dim=draw(st.none() | size),
        tied_output=kind != "pi0_fast" or draw(st.booleans()),
    )


def random_bytes(shape: tuple[int, ...], dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """Any bits, NaNs with payloads too."""
    count = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(rng.bytes(count), dtype).reshape(shape)


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("kind", ["pi0", "pi05", "pi0_fast", "pi0_lora"])
def test_full_size_openpi_names_and_shapes(kind: str):
    names = json.loads((Path(__file__).parents[1] / "layouts" / f"openpi_jax_{kind}.json").read_text())
    config = get_variant(kind)
    assert LAYOUTS["openpi_jax"].shapes(config) == {name: tuple(shape) for name, shape in names.items()}
    for layout in LAYOUTS.values():
        if kind in COUNTS and config.kind in layout.kinds:
            assert sum(int(np.prod(s)) for s in layout.shapes(config).values()) == COUNTS[kind]


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_tables_are_the_models(variant: str):
    """Names and shapes of the real modules, without allocating a weight."""
    from flax import nnx

    import pi0_jax.loading
    import pi0_torch.loading

    config = get_variant(variant)
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


@pytest.mark.parametrize("kind", KINDS)
def test_no_parameter_is_unused(kind: str):
    """Full-size: every parameter has a gradient from the outputs, found on the meta device without computing one."""
    import torch

    import pi0_torch

    module = pi0_torch.loading.abstract_model(get_variant(kind, remat="none"))
    config = module.config
    with torch.device("meta"):
        observation = pi0_torch.Observation(
            images={key: torch.empty(1, *config.image_resolution, 3) for key in config.image_keys},
            image_masks={key: torch.empty(1, dtype=torch.bool) for key in config.image_keys},
            state=torch.empty(1, config.action_dim),
            tokenized_prompt=torch.empty(1, config.max_token_len, dtype=torch.int64),
            tokenized_prompt_mask=torch.empty(1, config.max_token_len, dtype=torch.bool),
            token_ar_mask=torch.empty(1, config.max_token_len, dtype=torch.int32),
            token_loss_mask=torch.empty(1, config.max_token_len, dtype=torch.bool),
        )
        actions, time = torch.empty(1, config.action_horizon, config.action_dim), torch.empty(1)
    stages: dict[str, torch.Tensor] = {}
    if kind == "pi0_fast":
        module.compute_loss(observation).sum().backward()
    else:
        module.compute_loss(observation, actions, actions, time, stages)
        (stages["prefix_out"].float().sum() + stages["velocity"].sum()).backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []


def test_no_two_parameters_share_memory():
    import pi0_torch

    module = pi0_torch.Pi0(get_variant("tiny"))
    assert len({p.untyped_storage().data_ptr() for p in module.parameters()}) == len(module.state_dict())


@pytest.mark.parametrize("name", list(LAYOUTS))
@hypothesis.given(config=configs(), seed=st.integers(0, 99), half=st.booleans())
@hypothesis.settings(max_examples=25, deadline=None)
def test_there_and_back_returns_every_byte(name: str, config: ModelConfig, seed: int, half: bool):
    hypothesis.assume(config.kind in LAYOUTS[name].kinds)
    config = config if name in UNTIED else dataclasses.replace(config, tied_output=True)
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
    for n, rule in ((r.theirs, r) for r in layout.rules_for(config.kind, (), config.tied_output)):
        assert rule.groups[0] != ("l",) or theirs[n].sliced, n
    for tensors, wholes in ((theirs, stored), (back, ours)):
        for n, tensor in tensors.items():
            for i in range(tensor.shape[0]):
                for index in ((i,), (slice(i, i + 2),)):
                    if tensor.sliced:
                        assert same_bytes(tensor.read(index), wholes[n].read(index)), (n, index)
                    else:
                        with pytest.raises(IndexError, match=re.escape(n)):
                            tensor.read(index)


@hypothesis.given(config=configs())
@hypothesis.settings(max_examples=25, deadline=None)
def test_sizes_follow_from_shapes(config: ModelConfig):
    config = dataclasses.replace(config, tied_output=True)
    side = config.image_resolution[0]
    shapes = LAYOUTS["openpi_jax"].shapes(
        ModelConfig.from_dict(config.to_dict() | {"image_resolution": [side, side]}).with_runtime(dtype="bfloat16")
    )
    layout, kind, lora = detect(shapes)
    found = infer_config(layout, kind, shapes, lora)
    assert (layout.name, found.image_resolution) == ("openpi_jax", (side, side))
    fields = ("kind", "vision", "paligemma", "action_expert", "vocab_size")
    if config.kind == "pi0":
        assert found.state_size == config.state_size
    for field in (*fields, *(("action_dim",) if config.kind != "pi0_fast" else ())):  # no tensor of π0-FAST says it
        assert getattr(found, field) == getattr(config, field), field


@pytest.mark.parametrize("name", ["pi0_torch", "openpi_torch", "lerobot"])
def test_sizes_that_do_not_follow_are_asked_for(name: str):
    shapes = LAYOUTS[name].shapes(get_variant("tiny"))
    with pytest.raises(LayoutError, match="config"):
        infer_config(LAYOUTS[name], "pi0", shapes)


@pytest.mark.parametrize("name", list(LAYOUTS))
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("tiny")])
def test_a_layout_is_found_by_its_names(name: str, variant: str):
    config, layout = get_variant(variant), LAYOUTS[name]
    if config.kind not in layout.kinds:
        with pytest.raises(LayoutError, match=f"{name} cannot hold {config.kind}; it holds "):
            layout.shapes(config)
    elif lora_of(config) and not layout.has_lora:
        with pytest.raises(LayoutError, match="cannot hold LoRA"):
            layout.shapes(config)
    else:
        found, kind, lora = detect(layout.shapes(config))
        assert (found.name, kind, lora) == (name, config.kind, lora_of(config))


# ---- openpi's and LeRobot's PyTorch

PALIGEMMA = {
    "openpi_torch": "paligemma_with_expert.paligemma",
    "lerobot": "model.paligemma_with_expert.paligemma",
}


def pytorch_checkpoint(name: str, config: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Our parameters, and a model in a PyTorch layout: every name it has, with the copy and the unused tensor."""
    rng, layout = np.random.default_rng(0), LAYOUTS[name]
    ours = {n: Tensor.of(random_bytes(p.shape, np.dtype("float32"), rng)) for n, p in parameters(config).items()}
    theirs = layout.from_ours(config, ours)
    head, embedding = names_of_the_embedding(name)
    unused = Tensor.of(np.zeros((config.vocab_size, config.action_expert.width), np.float32))
    everything = theirs | {embedding: theirs[head], layout.unused[0].theirs: unused}
    return ours, {n: Tensor.of(t.read(())) for n, t in everything.items()}


def names_of_the_embedding(name: str) -> tuple[str, str]:
    """The one that is written, and the other."""
    return f"{PALIGEMMA[name]}.lm_head.weight", f"{PALIGEMMA[name]}.model.language_model.embed_tokens.weight"


def assert_read_as(ours: dict[str, Tensor], layout: Layout, config: ModelConfig, stored: dict[str, Tensor]) -> None:
    found, kind, lora = detect({n: t.shape for n, t in stored.items()})
    assert (found.name, kind, lora) == (layout.name, config.kind, ())
    read = layout.to_ours(config, stored)
    assert read.keys() == ours.keys()
    assert all(same_bytes(read[n].read(()), ours[n].read(())) for n in ours)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize(("name", "file"), [("openpi_torch", "openpi_pytorch"), ("lerobot", "lerobot")])
def test_full_size_pytorch_names_and_shapes(name: str, file: str, kind: str):
    """Read off the public implementations: all that we write is there, and all that we leave out is known."""
    listed = json.loads((Path(__file__).parents[1] / "layouts" / f"{file}_{kind}.json").read_text())
    shapes, layout, config = {n: tuple(s) for n, (s, _) in listed.items()}, LAYOUTS[name], get_variant(kind)
    written = layout.shapes(config)
    assert written.items() <= shapes.items()
    assert shapes.keys() - written.keys() == {names_of_the_embedding(name)[1], layout.unused[0].theirs}
    layout.check(config, shapes)
    assert detect(shapes) == (layout, kind, ())


@pytest.mark.parametrize("kind", KINDS)
def test_lerobots_names_under_newer_transformers_are_read(kind: str):
    """Since 5.6, above LeRobot's own limit, the vision tower has no `vision_model`."""
    listed = json.loads((Path(__file__).parents[1] / "layouts" / f"lerobot_{kind}_transformers_5_6.json").read_text())
    shapes, layout = {n: tuple(s) for n, (s, _) in listed.items()}, LAYOUTS["lerobot"]
    assert not any("vision_model" in n for n in shapes) and any(
        "vision_model" in n for n in layout.shapes(get_variant(kind))
    )
    layout.check(get_variant(kind), shapes)
    assert detect(shapes) == (layout, kind, ())


def test_full_size_lerobot_pi0_fast():
    """It holds the embedding twice and has no action expert."""
    listed = json.loads((Path(__file__).parents[1] / "layouts" / "lerobot_pi0_fast.json").read_text())
    shapes, config = {n: tuple(s) for n, (s, _) in listed.items()}, get_variant("pi0_fast")
    written, copy = LAYOUTS["lerobot"].shapes(config), names_of_the_embedding("lerobot")[1]
    assert {n: s for n, s in shapes.items() if n != copy} == written
    LAYOUTS["lerobot"].check(config, shapes)
    assert detect(shapes) == (LAYOUTS["lerobot"], "pi0_fast", ())


@pytest.mark.parametrize("name", list(PALIGEMMA))
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_pytorch_weights_are_as_openpi_converts_them(name: str, kind: str):
    """openpi's `examples/convert_jax_model_to_pytorch.py`, with its reshapes written for any sizes."""
    config = get_variant("tiny" if kind == "pi0" else "tiny_pi05")
    ours, stored = pytorch_checkpoint(name, config)
    jax = {n: t.read(()) for n, t in LAYOUTS["openpi_jax"].from_ours(config, ours).items()}
    n, width, image, layers = config.paligemma, config.vision.width, "PaliGemma/img", "PaliGemma/llm/layers"
    heads = f"{image}/Transformer/encoderblock/MultiHeadDotProductAttention_0"
    language, expert = "paligemma.model.language_model.layers.1", "gemma_expert.model.layers.1"
    tower = "paligemma.model.vision_tower.vision_model"
    query, (key, value), out = (jax[f"{layers}/attn/{x}/w"][1] for x in ("q_einsum", "kv_einsum", "attn_vec_einsum"))
    expected = {
        f"{language}.self_attn.q_proj.weight": query.transpose(0, 2, 1).reshape(n.num_heads * n.head_dim, n.width),
        f"{language}.self_attn.k_proj.weight": key.transpose(0, 2, 1).reshape(n.num_kv_heads * n.head_dim, n.width),
        f"{language}.self_attn.v_proj.weight": value.transpose(0, 2, 1).reshape(n.num_kv_heads * n.head_dim, n.width),
        f"{language}.self_attn.o_proj.weight": out.reshape(n.num_heads * n.head_dim, n.width).T,
        f"{language}.mlp.gate_proj.weight": jax[f"{layers}/mlp/gating_einsum"][1, 0].T,
        f"{language}.mlp.up_proj.weight": jax[f"{layers}/mlp/gating_einsum"][1, 1].T,
        f"{language}.mlp.down_proj.weight": jax[f"{layers}/mlp/linear"][1].T,
        f"{language}.input_layernorm.weight": jax[f"{layers}/pre_attention_norm/scale"][1],
        f"{language}.post_attention_layernorm.weight": jax[f"{layers}/pre_ffw_norm/scale"][1],
        f"{expert}.mlp.up_proj.weight": jax[f"{layers}/mlp_1/gating_einsum"][1, 1].T,
        f"{tower}.embeddings.patch_embedding.weight": jax[f"{image}/embedding/kernel"].transpose(3, 2, 0, 1),
        f"{tower}.embeddings.position_embedding.weight": jax[f"{image}/pos_embedding"].reshape(-1, width),
        f"{tower}.encoder.layers.1.self_attn.k_proj.weight": jax[f"{heads}/key/kernel"][1].reshape(width, -1).T,
        f"{tower}.encoder.layers.1.self_attn.q_proj.bias": jax[f"{heads}/query/bias"][1].reshape(-1),
        f"{tower}.encoder.layers.1.self_attn.out_proj.weight": jax[f"{heads}/out/kernel"][1].reshape(-1, width).T,
        "paligemma.model.multi_modal_projector.linear.weight": jax[f"{image}/head/kernel"].T,
        "paligemma.lm_head.weight": jax["PaliGemma/llm/embedder/input_embedding"],
    }
    if kind == "pi05":
        expected[f"{expert}.input_layernorm.dense.weight"] = jax[f"{layers}/pre_attention_norm_1/Dense_0/kernel"][1].T
    for suffix, array in expected.items():
        full = PALIGEMMA[name].removesuffix("paligemma") + suffix
        assert same_bytes(stored[full].read(()), array), full


@pytest.mark.parametrize("name", list(PALIGEMMA))
@pytest.mark.parametrize("variant", ["tiny", "tiny_pi05"])
def test_either_copy_or_both_are_read_and_what_is_unused_may_be_there(name: str, variant: str):
    config, layout = get_variant(variant), LAYOUTS[name]
    ours, stored = pytorch_checkpoint(name, config)
    for left_out in ((), *((copy,) for copy in names_of_the_embedding(name)), (layout.unused[0].theirs,)):
        assert_read_as(ours, layout, config, {n: t for n, t in stored.items() if n not in left_out})
    for copy in names_of_the_embedding(name):
        del stored[copy]
    with pytest.raises(LayoutError, match=r"missing .*paligemma\.lm_head\.weight"):
        layout.to_ours(config, stored)


def test_copies_that_differ_are_refused_by_both_names():
    """Before anything is made of them: by a zero's sign, a dtype, a shape. In LeRobot's they may differ (below)."""
    name = "openpi_torch"
    config, layout, (one, other) = get_variant("tiny"), LAYOUTS[name], names_of_the_embedding(name)
    _, stored = pytorch_checkpoint(name, config)
    zeros = np.zeros(stored[one].shape, np.float32)
    stored[one] = Tensor.of(zeros)
    for array in (-zeros, zeros.astype(np.float64)):
        ours = layout.to_ours(config, stored | {other: Tensor.of(array)})
        with pytest.raises(LayoutError) as error:
            ours["paligemma.embedding"].read(())
        assert one in str(error.value) and other in str(error.value)
    with pytest.raises(LayoutError, match=re.escape(other)):
        layout.to_ours(config, stored | {other: Tensor.of(zeros[1:])})


def test_an_output_projection_of_its_own_is_refused_where_it_has_no_place():
    config = get_variant("tiny_pi0_fast", tied_output=False)
    assert {"paligemma.output", "paligemma.embedding"} <= parameters(config).keys()
    for name, layout in LAYOUTS.items():
        if config.kind in layout.kinds and name not in UNTIED:
            with pytest.raises(LayoutError, match=f"the layout {name} has one tensor for the text embedding and"):
                layout.shapes(config)
    head, embedding = names_of_the_embedding("lerobot")
    assert {head, embedding} <= LAYOUTS["lerobot"].shapes(config).keys()


@pytest.mark.parametrize("name", list(PALIGEMMA))
def test_an_unused_tensor_of_another_shape_is_refused(name: str):
    config, layout = get_variant("tiny"), LAYOUTS[name]
    _, stored = pytorch_checkpoint(name, config)
    unused = layout.unused[0].theirs
    with pytest.raises(LayoutError, match=re.escape(unused)):
        layout.to_ours(config, stored | {unused: Tensor.of(stored[unused].read(())[1:])})


@pytest.mark.parametrize("name", list(PALIGEMMA))
def test_both_names_of_the_vision_tower_are_read(name: str):
    """That of the other version of transformers; the prefix `model.` is what tells LeRobot from openpi."""
    config, layout = get_variant("tiny"), LAYOUTS[name]
    ours, stored = pytorch_checkpoint(name, config)
    old, new = ".vision_tower.vision_model.", ".vision_tower."
    names = {n: n.replace(old, new) if old in n else n.replace(new, old) for n in stored}
    assert all(names[n] != n for n in names if "vision_tower" in n)
    respelled = {names[n]: t for n, t in stored.items()}
    assert_read_as(ours, layout, config, respelled)
    twice = next(n for n in names if n != names[n])
    assert_read_as(ours, layout, config, stored | {names[twice]: stored[twice]})  # equal copies, as above
    respelled[f"{names[twice]}_copy"] = respelled.pop(names[twice])
    with pytest.raises(LayoutError) as error:
        layout.to_ours(config, respelled)
    assert f"missing {twice}" in str(error.value) and f"unknown {names[twice]}_copy" in str(error.value)


def test_lerobots_names_without_its_prefix_are_openpis():
    """LeRobot's first releases are openpi's files."""
    config = get_variant("tiny")
    ours, stored = pytorch_checkpoint("lerobot", config)
    assert_read_as(ours, LAYOUTS["openpi_torch"], config, {n.removeprefix("model."): t for n, t in stored.items()})


def test_foreign_names():
    with pytest.raises(LayoutError, match=r"bert\.embeddings"):
        detect({"bert.embeddings": (1, 2)})


def test_positions_of_no_square_image_are_named():
    shapes = LAYOUTS["openpi_jax"].shapes(get_variant("tiny"))  # images of 28 x 42 pixels
    with pytest.raises(LayoutError, match=r"PaliGemma/img/pos_embedding holds 6 positions.*config="):
        infer_config(LAYOUTS["openpi_jax"], "pi0", shapes)


def test_disagreeing_shapes_name_both_tensors():
    config = get_variant("tiny")
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
    config = get_variant("tiny")
    ours = {n: Tensor.of(np.zeros(p.shape, np.float32)) for n, p in parameters(config).items()}
    name = "paligemma.layers.mlp.gate.kernel"
    ours[name] = Tensor.of(ours[name].read(()).astype(np.float64))
    with pytest.raises(LayoutError, match="gating_einsum"):
        LAYOUTS["openpi_jax"].from_ours(config, ours)
