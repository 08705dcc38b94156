from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from pi0.config import ConfigError, from_dict
from pi0.datasets.annotations import AnnotatedDataset, Questions
from pi0.datasets.errors import DataError
from pi0.datasets.fit_fast import action_chunks
from pi0.datasets.lerobot import LeRobotDataset
from pi0.masks import FAST, PREFIX, SUBTASK
from pi0.observation import Observation, ObservationError
from pi0.policy.subtasks import SubtaskSampler
from pi0.robots.metaworld import MetaWorld
from pi0.robots.pipeline import Pipeline
from pi0.robots.transforms import TokenizeRecipe
from pi0.run_config import RecipeConfig
from pi0.sample import METAWORLD
from pi0.sample.make_subtasks import FILE, subtasks
from pi0.tokenizers.fast import FASTTokenizer
from pi0.tokenizers.prompts import FASTPromptTokenizer, RecipeTokenizer
from pi0.tokenizers.text import BUNDLED, TextTokenizer
from pi0.variants import get_variant
from tests.pi0.robots.test_pipeline import assets

DATASET = LeRobotDataset(METAWORLD, action_horizon=5, episodes=[0])
MODEL = get_variant("tiny_pi05", vocab_size=1280, max_token_len=80)
STATE = np.array([0.1, -0.5, 0.9, 1.2])
TEXT = TextTokenizer(BUNDLED)


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    stats = assets("tiny_pi05").norm_stats["actions"]
    tokenizer = FASTTokenizer.fit(list(stats.apply(action_chunks(DATASET, MetaWorld()), "quantile")), vocab_size=512)
    tokenizer.save(tmp_path_factory.mktemp("fast") / "fast")
    return tokenizer


@pytest.fixture(scope="module")
def recipe(fast):
    return RecipeTokenizer(TEXT, FASTPromptTokenizer(TEXT, fast, MODEL.vocab_size))


def part(row, group: int) -> list[int]:
    return row["tokenized_prompt"][row["tokenized_prompt_mask"] & (row["token_group"] == group)].tolist()


def test_a_text_with_everything(recipe, fast):
    actions = np.zeros((5, 4))
    row = recipe.encode_prompt("open the_drawer\n", 120, STATE, "pull the drawer", actions)
    plain, mask = TEXT.encode_prompt("open the drawer", 120, STATE)
    prompt = TEXT.decode(plain[mask]).replace("Action: ", "Subtask: ")
    assert TEXT.decode(part(row, PREFIX)) == prompt
    assert part(row, SUBTASK) == [*TEXT.encode("pull the drawer"), TEXT.eos_id]
    cue, fast_ids = TEXT.encode("Action: "), recipe.fast.action_ids(actions)
    assert part(row, FAST) == cue + fast_ids and len(fast_ids) == len(fast.encode(actions)) + len(TEXT.encode("|")) + 1
    assert not row["token_group"][~row["tokenized_prompt_mask"]].any()
    assert recipe.read(np.array([*part(row, SUBTASK), 0, 0])) == "pull the drawer"


def test_without_a_subtask_the_prompt_is_plain_pi05(recipe):
    row = recipe.encode_prompt("open the drawer", 80, STATE, actions=np.zeros((5, 4)))
    plain, mask = TEXT.encode_prompt("open the drawer", 80, STATE)
    assert part(row, PREFIX) == plain[mask].tolist() and part(row, SUBTASK) == []
    assert part(row, FAST) == recipe.fast.action_ids(np.zeros((5, 4)))
    planned = recipe.encode_prompt("open the drawer", 80, STATE, predict_subtask=True)
    subtask = recipe.encode_prompt("open the drawer", 80, STATE, "pull")
    assert part(planned, PREFIX) == part(subtask, PREFIX) and not planned["token_group"].any()


def test_a_text_that_is_cut(recipe):
    row = recipe.encode_prompt("open the drawer", 34, STATE, "pull the drawer", np.zeros((5, 4)))
    assert row["tokenized_prompt_mask"].all() and len(part(row, FAST)) == 0


def test_rows_of_a_pipeline(fast, tmp_path):
    """Recorded frames with and without a subtask, a question, and a live frame; all fit into one batch but the last."""
    asked = tmp_path / "questions.jsonl"
    Image.fromarray(np.full((20, 30, 3), 7, np.uint8)).save(tmp_path / "a.png")
    lines = [{"image": "a.png", "question": "What is there?", "answer": "a box"}, {"question": "Why?", "answer": "so"}]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = dataclasses.replace(assets("tiny_pi05"), model=MODEL, subtasks=True, action_tokenizer=fast.reference())
    pipeline = Pipeline.from_assets(said)
    frames, questions = AnnotatedDataset(DATASET, FILE), Questions(asked, MODEL.image_keys[0])
    rows = [pipeline(item) for item in (frames[0], frames[0] | {"subtask": ""}, questions[0], questions[1])]
    keys = set().union(*rows)
    black = {key: np.zeros_like(rows[0][key]) for key in keys if key.startswith("image/")}
    data = {key: np.stack([(black | row)[key] for row in rows]) for key in keys}
    actions = data.pop("actions")
    observation = Observation.from_dict(data, MODEL)
    assert observation.has_actions.tolist() == [True, True, False, False] and actions.shape == (4, 5, 7)
    assert observation.image_masks[MODEL.image_keys[0]].tolist() == [True, True, True, False]
    assert observation.image_masks[MODEL.image_keys[1]].tolist() == [True, True, False, False]
    groups = [set(row["token_group"][row["tokenized_prompt_mask"]]) for row in rows]
    assert groups == [{PREFIX, SUBTASK, FAST}, {PREFIX, FAST}, {PREFIX, SUBTASK}, {PREFIX, SUBTASK}]
    assert TEXT.decode(part(rows[2], SUBTASK)) == "a box"
    live = pipeline({key: value for key, value in frames[0].items() if key not in ("action", "subtask")})
    assert "token_group" not in live and "has_actions" not in live
    assert live["tokenized_prompt"][live["tokenized_prompt_mask"]].tolist() == part(rows[0], PREFIX)
    only = observation.prompt_only()
    assert only.tokenized_prompt_mask.sum(axis=1).tolist() == [len(part(row, PREFIX)) for row in rows]
    assert only.token_group is None and only.has_actions is None
    assert Observation.from_dict(observation.to_dict(), MODEL).token_group.tolist() == observation.token_group.tolist()


def test_groups_out_of_order_are_refused():
    data = {
        "state": np.zeros((1, 7)),
        "tokenized_prompt": np.zeros((1, 80), int),
        "tokenized_prompt_mask": np.ones((1, 80), bool),
        "token_group": np.repeat([[SUBTASK, PREFIX]], 40, axis=1),
        "has_actions": np.ones(1, bool),
    }
    data |= {f"image_mask/{key}": np.zeros(1, bool) for key in MODEL.image_keys}
    with pytest.raises(ObservationError, match="in order"):
        Observation.from_dict(data, MODEL)
    with pytest.raises(ObservationError, match="has_actions"):
        Observation.from_dict(
            {key: value for key, value in data.items() if key != "has_actions"}
            | {"token_group": np.zeros((1, 80), int)},
            MODEL,
        )


def test_a_step_without_a_prompt(recipe):
    with pytest.raises(ValueError, match="prompt"):
        TokenizeRecipe(recipe, 80, 5, True)({"state": STATE})


def test_the_bundled_subtasks_are_those_of_the_recordings():
    assert FILE.read_text() == subtasks()
    frames = AnnotatedDataset(LeRobotDataset(METAWORLD, cameras=[], episodes=[4]), FILE)
    said = [frames[i]["subtask"] for i in range(len(frames))]
    assert list(dict.fromkeys(said)) == ["go over the puck", "go down to the puck", "grasp the puck", "push the puck"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("{", "line 1 is not JSON"),
        ('{"episode": 0}', "expected episode"),
        ('{"episode": 0, "start_frame": 0, "end_frame": 5, "subtask": ""}', "not empty"),
        ('{"episode": 99, "start_frame": 0, "end_frame": 5, "subtask": "a"}', "not in the dataset"),
        ('{"episode": 0, "start_frame": 0, "end_frame": 500, "subtask": "a"}', "has 59"),
        ('{"episode": 0, "start_frame": 3, "end_frame": 3, "subtask": "a"}', "frames 3 to 3"),
        ('{"episode": 0, "start_frame": 0, "end_frame": 5, "subtask": "a"}\n' * 2, "line 2"),
    ],
)
def test_bad_annotations(lines: str, said: str, tmp_path):
    file = tmp_path / "subtasks.jsonl"
    file.write_text(lines)
    with pytest.raises(DataError, match=said) as error:
        AnnotatedDataset(DATASET, file)
    assert str(file) in str(error.value)


def test_a_question_about_no_picture(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"image": "none.png", "question": "What?", "answer": "a"}\n')
    with pytest.raises(DataError, match=r"none\.png"):
        Questions(file, "base_0_rgb")[0]


@pytest.mark.parametrize(
    "values",
    [{"text_weight": -1}, {"flow_weight": float("nan")}, {"insulated": 1}, {"colour": 1}],
)
def test_bad_recipes(values):
    with pytest.raises(ConfigError, match="recipe"):
        from_dict(RecipeConfig, values, "recipe")


def test_a_recipe_without_any_weight():
    with pytest.raises(ConfigError, match="one positive"):
        RecipeConfig(0, 0, 0)


def test_a_planner_plans_every_so_many_chunks():
    asked = []

    def sample(observation, noise, subtask):
        asked.append(subtask)
        return (f"after {observation}" if subtask is None else subtask), noise

    planner = SubtaskSampler(sample, every=3)
    assert [planner(i, -i) for i in range(4)] == [("after 0", 0), ("after 0", -1), ("after 0", -2), ("after 3", -3)]
    assert asked == [None, "after 0", "after 0", None]
    planner.reset()
    assert planner(9, 0)[0] == "after 9"
    with pytest.raises(ValueError, match="every"):
        SubtaskSampler(sample, every=0)
