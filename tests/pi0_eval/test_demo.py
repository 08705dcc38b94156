from __future__ import annotations

import numpy as np
import pytest

from configs.metaworld_demo import get_config
from pi0_eval import demo


@pytest.mark.parametrize("variant", ["demo", pytest.param("demo_pi0_fast", marks=pytest.mark.slow)])
def test_the_demo_from_end_to_end(variant: str, tmp_path, monkeypatch, capsys):
    """A tiny model and a few steps: everything the demo leaves and prints, but not yet a good model."""

    def tiny(variant: str):
        config = get_config("tiny" if variant == "demo" else "tiny_pi0_fast")
        if variant == "demo_pi0_fast":
            config.model.update({"vocab_size": 1280, "max_token_len": 128, "action_horizon": 10})
        config.update({"batch_size": 8, "log_every": 2, "eval_every": 4, "save_every": 4})
        config.optimizer.warmup_steps = 1
        return config

    monkeypatch.setattr("configs.metaworld_demo.get_config", tiny)
    figures = demo.demo(tmp_path / "run", steps=4, variant=variant)
    for name in (
        "loss.png",
        "actions.png",
        "metrics.jsonl",
        "parity.json",
        "export/model.safetensors",
        "checkpoints/4",
    ):
        assert (tmp_path / "run" / name).exists(), name
    printed = capsys.readouterr().out
    assert "PASSED" in printed and "open the drawer" in printed and "next:" in printed
    if variant == "demo_pi0_fast":
        assert "the same in both frameworks" in printed and figures["tokens"] > 0
    assert figures["framework_difference"] < 3e-6  # float32 rounding
    assert np.isclose(figures["jax_error"], figures["torch_error"], rtol=1e-5)


def test_only_a_run_s_folder_is_replaced(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(SystemExit):
        demo.main(["--workdir", str(tmp_path)])
    assert (tmp_path / "thesis.txt").exists() and "not a run's folder" in capsys.readouterr().err
