from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np
import pytest

from convert.checkpoints import open_checkpoint
from convert.conversion import convert
from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from pi0.training.trainable import table
from pi0.variants import get_variant
from pi0_eval.parity.compare import errors
from pi0_eval.parity.frameworks import exact_matmuls, run_jax, run_torch
from pi0_eval.parity.inputs import Inputs
from pi0_jax.loading import abstract_model, flatten, parameters_of, unflatten
from pi0_jax.training.optimizer import make_schedule
from pi0_jax.training.train import train
from pi0_jax.training.trainable import join, kernels, split
from tests.small_run import small_config

LORA = get_variant("tiny_lora")


def lora_config(**changes):
    return small_config(eval_every=0, model=LORA.to_dict(), freeze="lora", **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A LoRA run of 4 steps that saves at 2 and 4."""
    workdir = tmp_path_factory.mktemp("lora")
    train(lora_config(), workdir)
    return workdir


def read(folder, **options):
    return {name: tensor.read(()) for name, tensor in open_checkpoint(folder, **options).ours.items()}


def test_only_what_is_asked_for_trains(run):
    """Bit for bit: low-rank updates, the vision tower and the projections change, the experts do not."""
    before, after = read(run, step=2, ema=False), read(run, step=4, ema=False)
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    experts = {name for name in before if name.startswith(("paligemma.", "action_expert."))}
    assert changed & experts == {name for name in experts if ".lora." in name}
    assert {name.split(".")[0] for name in changed - experts} >= {"vision", "state_proj", "action_out_proj"}


def test_the_optimizer_counts_only_what_trains(run):
    import orbax.checkpoint as ocp

    state = ocp.PyTreeCheckpointer().restore((run / "checkpoints" / "4" / "train_state").resolve())
    trains, frozen = split(unflatten(parameters_of(abstract_model(LORA))), lora_config().freeze_pattern)
    names = {name for name in flatten(trains)}
    assert "frozen" not in state and set(flatten(state["params"])) == set(flatten(state["ema"])) == names
    moments = [leaf for leaf in jax.tree.leaves(state["opt_state"]) if np.ndim(leaf)]
    assert sum(leaf.size for leaf in moments) == 2 * sum(np.prod(leaf.shape) for leaf in flatten(trains).values())
    assert flatten(frozen).keys() & names == set()


def test_a_frozen_run_goes_on_where_it_stopped(run, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        # The schedule belongs to the whole run, not to the part of it that was done.
        patch.setattr("pi0_jax.training.train.make_schedule", lambda config, steps: make_schedule(config, 4))
        train(lora_config(steps=2), tmp_path)
    train(lora_config(), tmp_path)
    whole, resumed = read(run), read(tmp_path)
    assert all(whole[name].tobytes() == resumed[name].tobytes() for name in whole)


def test_a_run_merges_into_what_it_computes(run, tmp_path):
    """In PyTorch, to rounding; the sizes differ, so `compare` would refuse them."""
    merged = convert(run, tmp_path / "merged", to="pi0_torch", lora="merge")
    with exact_matmuls():
        inputs = Inputs.random(LORA, batch=2, seed=0)
        ours = run_jax(open_checkpoint(run), LORA, inputs, num_steps=2, gradients=False)
        theirs = run_torch(merged, merged.assets.model, inputs, num_steps=2, gradients=False)
    assert errors(ours, theirs)["actions"] < 3e-6  # rounding


def test_split_and_join():
    params = {"a": {"kernel": 1, "lora": {"a": 2}}, "b": 3}
    trains, frozen = split(params, r"^a\.(?!lora)")
    assert (trains, frozen) == ({"a": {"lora": {"a": 2}}, "b": 3}, {"a": {"kernel": 1}})
    assert join(trains, frozen) == params and split(params, "") == (params, {})


def test_patterns_that_cannot_be_meant():
    params = {"a": 1}
    with pytest.raises(ValueError, match="every parameter"):
        split(params, "a")
    with pytest.raises(ValueError, match="no parameter; names are like a"):
        split(params, "vision")
    with pytest.raises(ValueError, match="regular expression"):
        dataclasses.replace(lora_config(), freeze="(")
    with pytest.raises(ValueError, match="lora_rank"):
        dataclasses.replace(lora_config(), model=get_variant("tiny"))


def test_the_table_counts():
    text = table({"a.lora.a": (2, 3)}, {"a.kernel": (1000,)})
    assert [line.split()[-2:] for line in text.splitlines()[1:]] == [["0", "1,000"], ["6", "0"], ["6", "1,000"]]


@pytest.mark.parametrize("variant", ["tiny_lora", "tiny_pi05", "tiny_pi0_fast"])
def test_openpi_s_norm_is_of_kernels(variant: str):
    """The same parameters as in openpi's `train_step`, by its pattern and its names."""
    config, rng = get_variant(variant), np.random.default_rng(0)
    shapes = parameters_of(abstract_model(config))
    params = {name: rng.standard_normal(leaf.shape, np.float32) for name, leaf in shapes.items()}
    theirs = LAYOUTS["openpi_jax"].from_ours(config, {name: Tensor.of(x) for name, x in params.items()})
    pattern = re.compile(".*/(bias|scale|pos_embedding|input_embedding)")
    chosen = [t.read(()) for name, t in theirs.items() if not pattern.fullmatch(name) and len(t.shape) > 1]
    ours = list(kernels(unflatten({name: jax.numpy.asarray(x) for name, x in params.items()})).values())
    assert sum(x.size for x in ours) == sum(x.size for x in chosen)
    norms = [np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in xs)) for xs in (map(np.asarray, ours), chosen)]
    np.testing.assert_allclose(*norms, rtol=1e-12)
