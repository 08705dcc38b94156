"""Run by openpi-client's environment: drive a server with openpi's own client, broker and runtime; prints JSON.

python drive_openpi_client.py PORT KEY
"""

import json
import sys

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.runtime.agents.policy_agent import PolicyAgent
from openpi_client.runtime.environment import Environment
from openpi_client.runtime.runtime import Runtime
from openpi_client.websocket_client_policy import WebsocketClientPolicy

PORT, KEY = int(sys.argv[1]), sys.argv[2]
HORIZON, STEPS = 5, 17


def observation(step: int) -> dict:
    rng = np.random.default_rng(step)
    found = {f"observation/{name}": rng.integers(0, 256, (30, 40, 3)).astype(np.uint8) for name in ("corner", "wrist")}
    return found | {"observation/state": rng.normal(size=4).astype(np.float32), "prompt": "open it"}


class Lab(Environment):
    def __init__(self) -> None:
        self.actions: list = []
        self.episodes = 0

    def reset(self) -> None:
        self.episodes += 1

    def is_episode_complete(self) -> bool:
        return len(self.actions) >= STEPS

    def get_observation(self) -> dict:
        return observation(len(self.actions) // HORIZON * HORIZON)

    def apply_action(self, action: dict) -> None:
        self.actions.append(np.asarray(action["actions"]).tolist())


def error(call) -> str:
    try:
        call()
    except Exception as found:
        return f"{type(found).__name__}: {found}"
    return ""


result: dict = {"numpy": np.__version__}
policy = WebsocketClientPolicy("127.0.0.1", PORT, api_key=KEY)
result["metadata"] = policy.get_server_metadata()
lab = Lab()
Runtime(lab, PolicyAgent(ActionChunkBroker(policy, HORIZON)), [], max_hz=200, num_episodes=1).run()
result["actions"], result["episodes"] = lab.actions, lab.episodes
first = policy.infer(observation(0))
result["keys"] = sorted(first)
result["timing"] = sorted(first["server_timing"])

wrong = observation(0)
wrong["observation/front"] = wrong.pop("observation/corner")
result["camera"] = error(lambda: policy.infer(wrong))
nan = observation(0)
nan["observation/state"][1] = np.nan
result["nan"] = error(lambda: policy.infer(nan))
result["after"] = error(lambda: policy.infer(observation(0)))
result["key"] = error(lambda: WebsocketClientPolicy("127.0.0.1", PORT, api_key="wrong"))
large = observation(0) | {"more": np.zeros(600_000_000, np.uint8)}
result["large"] = error(lambda: policy.infer(large))
again = WebsocketClientPolicy("127.0.0.1", PORT, api_key=KEY)
result["again"] = error(lambda: again.infer(observation(0)))
print(json.dumps(result))
