from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import av
import numpy as np
import pytest

import pi0_eval.closed_loop
from pi0.variants import get_variant
from pi0_eval.actors import LocalActor, RandomActor, ServerActor, noise_seed
from pi0_eval.closed_loop import Plan, Rollout
from pi0_eval.environments.protocols import PROTOCOLS
from pi0_eval.environments.workers import Pool
from pi0_eval.outcomes import (
    EPISODES,
    TRAJECTORY,
    Episode,
    Trajectory,
    compare_outcomes,
    mcnemar,
    paired_interval,
    read_episodes,
    summarize,
    table,
    wilson,
)
from pi0_eval.parity.sides import Side
from pi0_eval.rollout import main
from tests.pi0_eval.parity.test_compare import random_checkpoint, write
from tests.pi0_eval.test_replay import assets
from tests.pi0_serve.serving import Slow, serve

TOY = "tests.pi0_eval.toy_environment:Reach"
LEFT, RIGHT = ({"name": TOY, "task": task} for task in ("left", "right"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny π0 with random parameters, and norm stats that make its actions small."""
    found = dataclasses.replace(random_checkpoint(get_variant("tiny", max_token_len=24)), assets=assets())
    return write(found, tmp_path_factory.mktemp("rollout") / "torch", "pi0_torch")


@pytest.fixture(autouse=True)
def one_thread():
    """PyTorch's threads are slow where more of them run than there are cores."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def actor(checkpoint: Path) -> LocalActor:
    return LocalActor(str(checkpoint), Side.parse("torch"), 3)


@pytest.fixture(scope="module")
def pool():
    """Two workers for all tests."""
    with Pool(2, timeout=60) as pool:
        yield pool


def plan(**changes) -> Plan:
    return Plan(**({"references": (LEFT, RIGHT), "episodes": 5, "seed": 0, "replan": 2, "batch_size": 3} | changes))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a rollout that may not depend on how it was run."""
    lines = sorted((folder / EPISODES).read_bytes().splitlines())
    files = {file.name: file.read_bytes() for file in (folder / "trajectories").iterdir()}
    return files | {EPISODES: b"\n".join(lines)}


def test_the_same_with_one_worker_and_more_and_after_a_kill(actor: LocalActor, pool: Pool, tmp_path: Path, monkeypatch):
    """Bit for bit: actions, chunks and states of every episode."""
    Rollout(plan(), actor, pool, tmp_path / "two").run()
    with Pool(1) as one:
        Rollout(plan(), actor, one, tmp_path / "one").run()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")

    calls, append = [], pi0_eval.closed_loop.append_episode

    def killed(file: Path, episode: Episode) -> None:
        calls.append(episode)
        if len(calls) == 5:
            with file.open("a") as stream:
                stream.write('{"index": 9, "ta')  # and the power goes
            raise KeyboardInterrupt
        append(file, episode)

    monkeypatch.setattr(pi0_eval.closed_loop, "append_episode", killed)
    with pytest.raises(KeyboardInterrupt):
        Rollout(plan(), actor, pool, tmp_path / "cut").run()
    monkeypatch.undo()
    assert len(read_episodes(tmp_path / "cut" / EPISODES)) == 4
    Rollout(plan(), actor, pool, tmp_path / "cut").run()
    assert contents(tmp_path / "cut") == contents(tmp_path / "two")


def test_a_row_has_the_numbers_of_its_own_observation(actor: LocalActor):
    """Whatever is in the other rows, bit for bit."""
    rng = np.random.default_rng(0)
    rows = {
        i: {
            "corner": rng.integers(0, 255, (16, 16, 3), np.uint8),
            "wrist": rng.integers(0, 255, (16, 16, 3), np.uint8),
            "state": rng.normal(size=4).astype(np.float32),
            "prompt": "reach" * (i + 1),
        }
        for i in range(3)
    }
    seeds = {row: noise_seed(0, "left", row, 0) for row in rows}
    together = actor.act(rows, seeds)
    for row in rows:
        alone = actor.act({row: rows[row]}, {row: seeds[row]})
        assert alone.keys() == {row} and np.array_equal(alone[row], together[row])
    assert not np.array_equal(together[0], together[1])


def test_noise_is_that_of_an_episode_and_a_chunk():
    assert noise_seed(0, "left", 1, 2) == noise_seed(0, "left", 1, 2)
    other = [(1, "left", 1, 2), (0, "right", 1, 2), (0, "left", 2, 2), (0, "left", 1, 3)]
    assert noise_seed(0, "left", 1, 2) not in {noise_seed(*key) for key in other}


def test_initial_states_differ_and_are_listed(actor: LocalActor, pool: Pool, tmp_path: Path):
    episodes = Rollout(plan(references=(LEFT,)), actor, pool, tmp_path / "a").run()
    assert len({episode.initial for episode in episodes}) == 5
    (later,) = Rollout(plan(references=(LEFT,), episodes=1, first=3), actor, pool, tmp_path / "b").run()
    assert later.initial == episodes[3].initial


class Perfect:
    """Moves to the goal, which it finds in the image, in chunks of 4 whose later actions are of a plain 0.25."""

    cameras, horizon, rtc = ("corner", "wrist"), 4, None

    def __init__(self, later: float = 0.25):
        self.later, self.asked, self.seen = later, [], []

    def act(self, observations, seeds):
        self.asked.append(sorted(observations))
        self.seen.append(observations)
        chunks = {}
        for row, observation in observations.items():
            goal = (np.argwhere(observation["corner"][..., 0])[0] + 0.5 - 8) / 20
            x = -0.3 if observation["prompt"].endswith("left") else 0.3
            error = np.array([x, *goal]) - observation["state"][:3]
            chunks[row] = np.full((4, 4), self.later, np.float32)
            chunks[row][0] = [*np.clip(10 * error, -1, 1), 0.0]
        return chunks

    def describe(self):
        return {"checkpoint": "perfect"}

    def close(self):
        return None


def test_a_policy_that_sees_succeeds_and_a_blind_one_does_not(pool: Pool, tmp_path: Path):
    perfect = Rollout(plan(replan=1), Perfect(), pool, tmp_path / "perfect").run()
    assert {e.outcome for e in perfect} == {"success"} and max(e.steps for e in perfect) < 7
    blind = Rollout(plan(), RandomActor(4, 2), pool, tmp_path / "random").run()
    assert sum(e.outcome == "success" for e in blind) < 3
    assert all(e.steps == 12 for e in blind if e.outcome == "failure")
    short = Rollout(plan(limits={f"{TOY}/left": 1}, replan=1), Perfect(), pool, tmp_path / "short").run()
    assert {e.steps for e in short if e.task.endswith("left")} == {1}


def test_what_is_applied_of_each_chunk(pool: Pool, tmp_path: Path):
    """Two of four actions, then, with a latency of one step, one of the last chunk before one of the new."""
    for latency in (0, 1):
        folder, policy = tmp_path / str(latency), Perfect(later=-0.5)
        Rollout(plan(references=(LEFT,), episodes=1, latency=latency), policy, pool, folder).run()
        done = Trajectory.read(folder / TRAJECTORY.format(index=0))
        assert (
            done.starts.tolist() == list(range(0, len(done.actions), 2)) and len(done.states) == len(done.actions) + 1
        )
        expected = [done.chunks[0][:2]]
        for last, new in zip(done.chunks[:-1], done.chunks[1:], strict=True):
            expected.append(np.concatenate([last[2 : 2 + latency], new[latency:2]]))
        assert np.array_equal(done.actions, np.concatenate(expected)[: len(done.actions)])


def test_real_time_chunking_gets_the_rest_of_the_last_chunk(pool: Pool, tmp_path: Path):
    policy = Perfect(later=-0.5)
    policy.rtc = "guided"
    Rollout(plan(references=(LEFT,), episodes=1, latency=1), policy, pool, tmp_path / "a").run()
    first, *later = [observations[0] for observations in policy.seen]
    chunks = Trajectory.read(tmp_path / "a" / TRAJECTORY.format(index=0)).chunks
    assert "prev_chunk" not in first and len(later) == len(chunks) - 1 > 1
    for observation, last in zip(later, chunks, strict=False):
        assert observation["delay"] == 1 and np.array_equal(observation["prev_chunk"], last[2:])


def test_a_policy_with_real_time_chunking(checkpoint: Path, actor: LocalActor, pool: Pool, tmp_path: Path):
    """Its first chunks are those without, and the guided ones after them are others."""
    guided = LocalActor(str(checkpoint), Side.parse("torch"), 3, rtc="guided")
    assert guided.describe() == actor.describe() | {"rtc": "guided"}
    settings = plan(references=(LEFT,), episodes=3, latency=1)
    for name, policy in (("plain", actor), ("guided", guided)):
        Rollout(settings, policy, pool, tmp_path / name).run()
    for i in range(3):
        a, b = (Trajectory.read(tmp_path / name / TRAJECTORY.format(index=i)).chunks for name in ("plain", "guided"))
        assert np.array_equal(a[0], b[0]) and not np.allclose(a[1], b[1], atol=1e-3)


def test_first_steps_that_do_nothing_are_not_counted(pool: Pool, tmp_path: Path):
    idle, none = (Rollout(plan(references=(LEFT,), idle=n), Perfect(), pool, tmp_path / str(n)).run() for n in (2, 0))
    assert [e.steps for e in idle] == [e.steps for e in none] and idle[0].initial != none[0].initial


@pytest.mark.parametrize(("option", "said"), [("raises", "became unstable"), ("dies", "exit code 3")])
def test_an_exception_is_an_error_and_no_failure(option: str, said: str, tmp_path: Path, capsys):
    """Of its episode alone (of a process that died, of all in it), and tried again by the next run."""
    reference = LEFT | {option: 1, "marker": str(tmp_path / "once")}
    with Pool(2) as pool:
        episodes = Rollout(plan(references=(reference,), replan=1), Perfect(), pool, tmp_path / "out").run()
        wrong = [e for e in episodes if e.outcome == "error"]
        assert len(episodes) == 5 and [e.episode for e in wrong] == [1] and said in wrong[0].error
        (row,) = summarize(episodes)
        assert (row["episodes"], row["successes"], row["rate"], row["errors"]) == (4, 4, 1.0, 1)
        again = Rollout(plan(references=(reference,), replan=1), Perfect(), pool, tmp_path / "out").run()
    assert {e.outcome for e in again} == {"success"}
    assert "episode 1: error" in capsys.readouterr().err


def test_a_simulator_that_hangs(tmp_path: Path):
    reference = LEFT | {"sleeps": 0, "marker": str(tmp_path / "once")}
    with Pool(1, timeout=3) as pool:
        (episode,) = Rollout(plan(references=(reference,), episodes=1, replan=1), Perfect(), pool, tmp_path / "a").run()
    assert episode.outcome == "error" and "did not answer within 3 s" in episode.error


def test_nothing_but_errors_ends_the_run(tmp_path: Path):
    reference = LEFT | {"raises": 0}
    with Pool(1) as pool, pytest.raises(RuntimeError, match="all of 3 episodes ended in an error"):
        rollout = Rollout(plan(references=(reference,) * 40, episodes=1, replan=1), Perfect(), pool, tmp_path / "a")
        rollout.run()


def test_a_folder_of_another_rollout(actor: LocalActor, checkpoint: Path, pool: Pool, tmp_path: Path):
    Rollout(plan(), actor, pool, tmp_path / "a")
    with pytest.raises(ValueError, match="its replan differ"):
        Rollout(plan(replan=3), actor, pool, tmp_path / "a")
    (checkpoint / "added.json").write_text("{}")
    with pytest.raises(ValueError, match="its policy differ"):  # the folder of a run has a new checkpoint, say
        Rollout(plan(), LocalActor(str(checkpoint), Side.parse("torch"), 3), pool, tmp_path / "a")
    (checkpoint / "added.json").unlink()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="no rollout's folder"):
        Rollout(plan(), actor, pool, tmp_path / "b")
    with pytest.raises(ValueError, match="more than the 5 actions of a chunk"):
        Rollout(plan(replan=5, latency=1), actor, pool, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_the_command(checkpoint: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    options = ["--env", TOY, "--episodes", "2", "--replan", "3", "--batch-size", "2", "--seed", "3"]
    main([str(checkpoint), *options, "--out", str(out), "--videos", "1"])
    printed = capsys.readouterr().out
    assert "4 of 4" in printed and "95 % interval" in printed and "physics" in printed
    results = json.loads((out / "results.json").read_text())
    assert [row["task"] for row in results["results"]] == [f"{TOY}/left", f"{TOY}/right", "all"]
    assert results["plan"]["seed"] == 3 and results["policy"]["side"] == "torch:plain"
    page = (out / "report.html").read_text()
    assert "data:video/mp4;base64," in page and "http" not in page and f"{TOY}/right" in page
    steps = read_episodes(out / EPISODES)[1].steps
    with av.open(str(out / "videos" / "000001.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == steps
    orange = (np.abs(frames[0][:, -288:].astype(int) - (217, 95, 2)) < 60).all(-1)
    assert orange.any()  # the chunk

    before = contents(out)
    main([str(checkpoint), *options, "--out", str(out), "--videos", "1"])  # nothing is left to do
    assert contents(out) == before


def test_a_comparison_of_frameworks(checkpoint: Path, tmp_path: Path, capsys):
    """The same seeds, the same noise: first chunks equal to rounding, and the same outcome of every episode."""
    options = ["--env", TOY, "--episodes", "2", "--replan", "3", "--batch-size", "2", "--side", "jax", "torch"]
    main(["--compare", str(checkpoint), str(checkpoint), *options, "--out", str(tmp_path / "out")])
    figures = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert figures["pairs"] == figures["same_actions"] == 4 and figures["only_a"] == figures["only_b"] == 0
    assert figures["first_chunk"] < 3e-6  # rounding, as of single chunks (tests/pi0_eval/parity)
    assert "McNemar p = 1.000" in capsys.readouterr().out
    main(["--compare", str(tmp_path / "out" / "a"), str(tmp_path / "out" / "b")])  # as they are


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give one of a checkpoint"),
        (["random", "--server", "ws://here"], "got checkpoint, server"),
        (["random"], "give --out"),
        (["random", "--out", "x"], "no environment"),
        (["random", "--env", "mars", "--out", "x"], "unknown environment"),
        (["random", "--env", f"{TOY}/up", "--out", "x"], "no task 'up'"),
        (["random", "--env", TOY, "--out", "x", "--side", "jax", "torch"], "2 sides"),
        (["random", "--env", TOY, "--out", "x", "--videos", "some"], "--videos 'some'"),
        (["random", "--env", TOY, "--out", "x", "--episodes", "-1"], "episodes is -1"),
        (["random", "--env", f'{{"name": "{TOY}/left", "wings": 2}}', "--out", "x"], "no options .*wings"),
        (["--compare", "a", "b", "--env", TOY], "give --out"),
        (["random", "--env", TOY, "--out", "x", "--rtc", "guided"], "--rtc is for checkpoints"),
    ],
)
def test_arguments_that_do_not_fit(arguments: list[str], said: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    with pytest.raises(SystemExit):
        main(arguments)
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


def episode(index: int, outcome: str, **fields) -> Episode:
    return Episode(index, "t", index, 0, outcome, 5, **fields)


def test_intervals():
    """Against Wilson's and McNemar's published formulas, computed elsewhere (statsmodels 0.14)."""
    np.testing.assert_allclose(wilson(8, 10), (0.4901625, 0.9433178), atol=1e-6)
    np.testing.assert_allclose(wilson(0, 25), (0.0, 0.1331923), atol=1e-6)
    assert wilson(25, 25)[1] == 1.0 and wilson(0, 0) == (0.0, 1.0)
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0
    np.testing.assert_allclose(mcnemar(1, 9), 0.021484375)
    low, high = paired_interval(9, 1, 40)
    assert 0 < low < (9 - 1) / 42 < high < 0.4


def test_errors_are_outside_of_the_rate():
    rows = summarize([episode(0, "success"), episode(1, "failure"), episode(2, "error", error="boom")])
    assert rows[0]["rate"] == 0.5 and rows[0]["errors"] == 1 and rows[0]["episodes"] == 2
    assert "50.0%" in table(rows)
    assert summarize([episode(0, "error")])[0]["rate"] is None and "-" in table(summarize([episode(0, "error")]))


def test_rollouts_of_other_episodes_are_not_compared(pool: Pool, tmp_path: Path):
    Rollout(plan(replan=1), Perfect(), pool, tmp_path / "a").run()
    Rollout(plan(replan=1, seed=1), Perfect(), pool, tmp_path / "b").run()
    with pytest.raises(ValueError, match="episode 0 is"):
        compare_outcomes(tmp_path / "a", tmp_path / "b")
    Rollout(plan(replan=1, episodes=4), Perfect(), pool, tmp_path / "c").run()
    with pytest.raises(ValueError, match="not of the same episodes"):
        compare_outcomes(tmp_path / "a", tmp_path / "c")


def test_where_trajectories_part(pool: Pool, tmp_path: Path):
    Rollout(plan(), Perfect(), pool, tmp_path / "a").run()
    Rollout(plan(), Perfect(later=-1.0), pool, tmp_path / "b").run()
    figures = compare_outcomes(tmp_path / "a", tmp_path / "b")
    assert {row["parts_at"] for row in figures["episodes"]} == {1} and figures["same_actions"] == 0
    assert figures["success_a"] - figures["success_b"] == figures["only_a"] - figures["only_b"]


def test_liberos_protocol_is_openpis():
    libero = PROTOCOLS["libero"]
    assert (libero.episodes, libero.seed, libero.idle, libero.replan) == (50, 7, 10, 5)
    limits = {
        s: libero.limit({"name": "libero", "task": f"libero_{s}/0"}) for s in ("spatial", "object", "goal", "10", "90")
    }
    assert limits == {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}


def test_a_server(tmp_path: Path):
    """Asked with the noise that a local policy would have."""
    seen: list[np.ndarray] = []

    class Recorded(Slow):
        def sample(self, observation, noise):
            seen.extend(noise)
            return super().sample(observation, noise)

    with serve(Recorded()) as served_at:
        actor = ServerActor(f"ws://127.0.0.1:{served_at.port}", 3)
        assert actor.seeded and actor.horizon == 5 and actor.cameras == ("corner", "wrist")
        with Pool(1) as pool:
            served = Rollout(plan(episodes=2), actor, pool, tmp_path / "served").run()
        actor.close()
    assert len(served) == 4 and {e.outcome for e in served} <= {"success", "failure"}
    first = np.random.default_rng(noise_seed(0, f"{TOY}/right", 1, 0)).normal(size=(5, 7)).astype(np.float32)
    assert any(np.array_equal(noise, first) for noise in seen)
