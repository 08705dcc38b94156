"""PaliGemma's published weights, and other sources that lack a part of the model that is asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert.checkpoints import Checkpoint, open_checkpoint
from convert.conversion import convert, main
from convert.formats.npz import read_npz
from convert.formats.safetensors import read_safetensors, write_safetensors
from convert.inspection import inspect
from convert.layouts.registry import LAYOUTS
from convert.tensors import CheckpointError, Tensor
from pi0.parameters import LayoutError, parameters
from pi0.variants import get_variant
from tests.convert.test_checkpoints import assert_same, random_checkpoint, write

FAST, PI0 = get_variant("tiny_pi0_fast"), get_variant("tiny")
# PaliGemma's sizes are those of both.
FAST = dataclasses.replace(
    FAST, vision=PI0.vision, paligemma=PI0.paligemma, vocab_size=512, image_resolution=PI0.image_resolution
)


@pytest.fixture(scope="module")
def paligemma() -> dict[str, np.ndarray]:
    """PaliGemma's parameters by our names."""
    rng = np.random.default_rng(0)
    return {n: (rng.normal(size=p.shape) * 0.1).astype(np.float32) for n, p in parameters(FAST).items()}


def published(layout: str, ours: dict[str, np.ndarray], folder: Path) -> Path:
    """PaliGemma as it is published."""
    tensors = LAYOUTS[layout].from_ours(FAST, {n: Tensor.of(x) for n, x in ours.items()})
    if layout == "paligemma_npz":
        np.savez(folder / "pt_224.npz", **{name: tensor.read(()) for name, tensor in tensors.items()})
        return folder / "pt_224.npz"
    # Hugging Face's vocabulary is longer, its embedding tied.
    embedding = tensors["language_model.model.embed_tokens.weight"].read(())
    tensors["language_model.model.embed_tokens.weight"] = Tensor.of(np.concatenate([embedding, embedding[:64]]))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("layout", ["paligemma_npz", "paligemma_hf"])
def test_a_new_action_expert_on_paligemma(layout: str, paligemma, tmp_path):
    source = published(layout, paligemma, tmp_path)
    opened = open_checkpoint(source, PI0, fresh=7)
    assert opened.layout.name == layout and list(opened.ours) == list(parameters(PI0))
    expert = {name for name in opened.ours if not name.startswith(("vision.", "paligemma."))}
    assert set(opened.fresh) == expert
    assert_same(
        {n: t for n, t in opened.ours.items() if n not in expert}, {n: Tensor.of(x) for n, x in paligemma.items()}
    )
    said: list[str] = []
    written = convert(source, tmp_path / "start", to="pi0_torch", config=PI0, fresh=7, log=said.append)
    assert any("newly initialized" in line for line in said)
    assert_same(written.ours, opened.ours)  # drawn from the seed, whenever it is read
    other = open_checkpoint(source, PI0, fresh=8)
    name = "action_expert.layers.mlp.up.kernel"
    assert not np.array_equal(other.ours[name].read(()), opened.ours[name].read(()))


def test_fresh_parameters_are_distributed_as_a_new_model_s(paligemma, tmp_path):
    """Standard deviations within a tenth: the smallest kernel has 140 values, one deviation of which is 6 %."""
    import jax
    from flax import nnx

    from pi0_jax.loading import make_model, parameters_of

    model = dataclasses.replace(
        get_variant("tiny_lora"),
        paligemma=dataclasses.replace(PI0.paligemma, lora_rank=3, lora_alpha=6.0),
        kind="pi05",
    )
    opened = open_checkpoint(published("paligemma_npz", paligemma, tmp_path), model, fresh=0)
    init = parameters_of(jax.jit(lambda: make_model(model, rngs=nnx.Rngs(0)))())
    for name in opened.fresh:
        ours, theirs = opened.ours[name].read(()), np.asarray(init[name])
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.25 if ours.size < 1000 else 0.1, err_msg=name)


def test_the_vision_language_model_alone_is_a_pi0_fast(paligemma, tmp_path):
    source = published("paligemma_npz", paligemma, tmp_path)
    assert inspect(source).kind == "pi0_fast" and inspect(source).layout == "paligemma_npz"
    assert_same(open_checkpoint(source, FAST).ours, {n: Tensor.of(x) for n, x in paligemma.items()})
    with pytest.raises(SystemExit):
        main([str(source), str(tmp_path / "x"), "--to", "paligemma_npz"])


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_hugging_face_names_of_every_version(prefix: str, paligemma, tmp_path):
    tensors = read_safetensors(published("paligemma_hf", paligemma, tmp_path) / "model.safetensors")
    renamed = {
        name.replace("language_model.model.", prefix) if name.startswith("language_model.") else name: tensor
        for name, tensor in tensors.items()
    }
    if prefix.startswith("model."):
        renamed = {f"model.{n}" if n.startswith(("vision", "multi")) else n: t for n, t in renamed.items()}
        renamed["lm_head.weight"] = renamed[f"{prefix}embed_tokens.weight"]
    (tmp_path / "other").mkdir()
    write_safetensors(tmp_path / "other" / "model.safetensors", renamed)
    assert_same(open_checkpoint(tmp_path / "other", PI0, fresh=0).ours, open_checkpoint(tmp_path, PI0, fresh=0).ours)


def test_new_lora_on_a_base(tmp_path):
    base, lora = write(random_checkpoint(), tmp_path / "base", "openpi_jax"), get_variant("tiny_lora")
    opened = open_checkpoint(base, lora, fresh=0)
    assert opened.fresh and all(".lora." in name for name in opened.fresh)
    with pytest.raises(LayoutError, match="missing"):
        open_checkpoint(base, lora)


def test_only_whole_parts_may_be_missing(paligemma, tmp_path):
    """A source that lost one tensor is damaged, not in need of a new one."""
    ours = dict(paligemma)
    source = published("paligemma_npz", ours, tmp_path)
    arrays = dict(np.load(source))
    lost = arrays.pop("params/llm/final_norm/scale")
    np.savez(source, **arrays)
    with pytest.raises(LayoutError, match="final_norm"):
        open_checkpoint(source, PI0, fresh=0)
    checkpoint = random_checkpoint("tiny_lora")
    folder = write(checkpoint, tmp_path / "lora", "pi0_torch")
    tensors = dict(read_safetensors(folder / "model.safetensors"))
    name = next(n for n in tensors if ".lora." in n)
    kept = {n: Tensor.of(np.array(t.read(()))) for n, t in tensors.items() if n != name}
    write_safetensors(folder / "model.safetensors", kept)
    with pytest.raises(LayoutError, match=name):
        open_checkpoint(folder, checkpoint.assets.model, fresh=0)
    assert lost.size


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_lazily_and_exactly(save, tmp_path):
    arrays = {
        "a/b": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "c": np.arange(5).astype(ml_dtypes.bfloat16),
        "d": np.float32(3),
    }
    save(tmp_path / "x.npz", **arrays)
    found = read_npz(tmp_path / "x.npz")
    assert_same(found, {name: Tensor.of(np.asarray(x)) for name, x in arrays.items()})
    np.testing.assert_array_equal(found["a/b"].read((1, slice(1, 3))), arrays["a/b"][1, 1:3])


def test_damaged_npz_files_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros(1000, np.float32))
    content = (tmp_path / "x.npz").read_bytes()
    for damaged in (content[:500], b"", b"x" * 100):
        (tmp_path / "y.npz").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"y\.npz"):
            read_npz(tmp_path / "y.npz")


def test_training_starts_from_a_base(tmp_path):
    """The parameters before the first step are the base's, and frozen ones stay, in bfloat16."""
    from pi0_jax.training.train import train
    from tests.small_run import small_config

    base = write(random_checkpoint(), tmp_path / "base", "openpi_jax")
    start = {"base_checkpoint": str(base), "freeze": r"^(vision|paligemma)\.", "frozen_dtype": "bfloat16"}
    optimizer = {"peak_lr": 0.0, "final_lr": 0.0, "weight_decay": 0.0}
    config = small_config(steps=2, save_every=1, eval_every=0, optimizer=optimizer, **start)
    train(config, tmp_path / "run")
    trained: Checkpoint = open_checkpoint(tmp_path / "run")
    for name, tensor in open_checkpoint(base).ours.items():
        wanted, found = tensor.read(()), trained.ours[name].read(())
        if name.startswith(("vision.", "paligemma.")):
            wanted = wanted.astype(ml_dtypes.bfloat16)
        assert found.dtype == wanted.dtype and found.tobytes() == wanted.tobytes(), name
