"""The two stages of π0.5's recipe in little, from recordings to scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import pi0_jax
import pi0_torch
from pi0.config import ConfigError
from pi0.datasets.fit_fast import action_chunks
from pi0.datasets.lerobot import LeRobotDataset
from pi0.datasets.statistics import dataset_statistics
from pi0.experiments import read_config
from pi0.robots.metaworld import MetaWorld
from pi0.sample import METAWORLD
from pi0.tokenizers.fast import FASTTokenizer
from pi0_eval.scores import evaluate, main
from pi0_jax.training.train import train

KEPT, HELD_OUT = (0, 4), (5,)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A FAST tokenizer, a file of questions, and a run of the second stage, of two episodes, two steps long."""
    folder = tmp_path_factory.mktemp("recipe")
    whole, kept = (LeRobotDataset(METAWORLD, action_horizon=5, episodes=e, cameras=[]) for e in (None, KEPT))
    stats = dataset_statistics(kept, MetaWorld())["actions"].norm_stats()
    chunks = stats.apply(action_chunks(whole, MetaWorld()), "quantile")
    FASTTokenizer.fit(list(chunks), scale=2, vocab_size=512).save(folder / "fast")
    Image.fromarray(np.full((28, 42, 3), 255, np.uint8)).save(folder / "white.png")
    rows = [{"image": "white.png", "question": "Which colour?", "answer": "white"}, {"question": "1?", "answer": "2"}]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(experiment(folder, "posttrain"), folder / "posttrain")
    return folder


def experiment(folder, stage: str, base: str = "", *overrides: str):
    mixture = [{"weight": 3.0}, {"questions": str(folder / "questions.jsonl"), "weight": 1.0}]
    return read_config(
        f"configs/pi05_{stage}.py:tiny",
        [
            f"--config.base_checkpoint={base}",
            "--config.steps=2",
            "--config.batch_size=6",
            "--config.log_every=1",
            "--config.save_every=2",
            "--config.eval_every=2",
            "--config.optimizer.warmup_steps=1",
            f"--config.data.action_tokenizer={folder / 'fast'}",
            f"--config.data.mixture={mixture}",
            f"--config.data.validation_episodes={[e for e in range(16) if e not in KEPT]}",
            *overrides,
        ],
    )


def parts_of(folder) -> set[str]:
    """The parts of the loss that a run's metrics have. The loss is their weighted sum."""
    weights = {"text_loss": 1, "fast_loss": 1, "flow_loss": 10}
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    parts = {name: value for name, value in row.items() if name in weights}
    assert row["loss"] == pytest.approx(sum(weights[name] * value for name, value in parts.items()), rel=1e-5)
    return set(parts)


def test_the_parts_of_the_loss(folder):
    assert parts_of(folder / "posttrain") == {"text_loss", "fast_loss", "flow_loss"}


@pytest.mark.slow
def test_both_stages(folder, tmp_path):
    """The first teaches the text alone; the second goes on from what it has learned."""
    train(experiment(folder, "pretrain"), tmp_path / "pretrain")
    assert parts_of(tmp_path / "pretrain") == {"text_loss", "fast_loss"}
    train(experiment(folder, "posttrain", str(tmp_path / "pretrain")), tmp_path / "posttrain")
    assert parts_of(tmp_path / "posttrain") == {"text_loss", "fast_loss", "flow_loss"}
    fresh, taught = (
        json.loads((f / "posttrain" / "metrics.jsonl").read_text().splitlines()[0]) for f in (folder, tmp_path)
    )
    assert taught["text_loss"] < fresh["text_loss"] and taught["fast_loss"] < fresh["fast_loss"]


def test_scores_are_the_same_in_both_frameworks(folder, capsys):
    """Texts exactly, actions to float32's rounding; the table and the JSON say the same."""
    options = dict(episodes=HELD_OUT, every=9, batch=4, num_steps=2, questions=[str(folder / "questions.jsonl")])
    torch = evaluate(folder / "posttrain", framework="torch", **options)
    jax = evaluate(folder / "posttrain", framework="jax", **options)
    assert list(torch) == [
        "subtask",
        "FAST tokens",
        "actions, predicted subtask",
        "actions, true subtask",
        "answers, questions",
        "actions, directly",
    ]
    for name, score in torch.items():
        for value, same in zip(vars(score).values(), vars(jax[name]).values(), strict=True):
            assert (value is None and same is None) or value == pytest.approx(same, rel=1e-5), name
    assert torch["subtask"].count == 9 and torch["answers, questions"].count == 2
    command = [str(folder / "posttrain"), "--episodes", "5", "--every", "9", "--batch", "4", "--num-steps", "2"]
    main([*command, "--json", str(folder / "scores.json")])
    written = json.loads((folder / "scores.json").read_text())["scores"]
    assert written["subtask"]["tokens"] == torch["subtask"].tokens
    assert f"{torch['subtask'].tokens:.1%}" in capsys.readouterr().out


def test_policies_say_their_subtask(folder):
    """The same in both frameworks; kept for the second of two chunks."""
    frames = LeRobotDataset(METAWORLD, episodes=HELD_OUT)
    ours = pi0_jax.Policy.from_pretrained(folder / "posttrain", num_steps=2).infer(frames[0])
    policy = pi0_torch.Policy.from_pretrained(folder / "posttrain", num_steps=2, subtask_every=2)
    theirs, later = policy.infer(frames[0]), policy.infer(frames[20])
    assert ours["subtask"] == theirs["subtask"] == later["subtask"] and later["actions"].shape == (5, 4)
    np.testing.assert_allclose(ours["actions"], theirs["actions"], rtol=0, atol=1e-5)  # of about 1, in float32


def test_what_cannot_be_scored_or_trained(folder, capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["tests/golden/pi05/checkpoint"])
    assert "--episodes" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="kind is pi0"):
        train(experiment(folder, "pretrain", "", "--config.model.kind=pi0"), tmp_path / "run")
    with pytest.raises(ConfigError, match="action_tokenizer"):
        train(experiment(folder, "pretrain", "", "--config.data.action_tokenizer="), tmp_path / "run")
    assert not (tmp_path / "run").exists()
