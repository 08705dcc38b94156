"""Meta-World's steps per second in a rollout with 1 and 2 workers, and in a plain loop of the simulator.

    python benchmarks/rollout.py

Random actions, two images after every tenth step, as a policy with chunks of ten has them. In turns, `--repeats` times
each; the best time counts. CPU seconds are those of all processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from pi0_eval.actors import RandomActor, noise_seed
from pi0_eval.closed_loop import Plan, Rollout
from pi0_eval.environments.workers import Begin, Pool

TASK, CAMERAS, SIZE, REPLAN = "drawer-open-v3", ("topview", "behindGripper"), 128, 10
REFERENCE = {"name": "metaworld", "task": TASK, "size": SIZE}


def cpu_seconds(processes: list[int]) -> float:
    """The CPU time that these processes have taken so far."""
    fields = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split() for process in processes]
    return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")


def plain(episodes: int, limit: int, results: multiprocessing.Queue) -> None:
    """The simulator alone, in a process of its own."""
    os.environ.setdefault("MUJOCO_GL", "osmesa")
    import mujoco
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    env = ALL_V3_ENVIRONMENTS[TASK]()
    env._freeze_rand_vec, env.seeded_rand_vec, env._set_task_called, env.max_path_length = False, True, True, 10**9
    env.model.vis.quality.offsamples = env.model.vis.quality.shadowsize = 0
    with mujoco.Renderer(env.model, SIZE, SIZE) as renderer:
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            renderer.scene.flags[flag] = 0

        def observe() -> None:
            for camera in CAMERAS:
                renderer.update_scene(env.data, camera)
                renderer.render()

        env.seed(0)
        env.reset()
        observe()
        start, cpu, steps = time.perf_counter(), time.process_time(), 0
        for episode in range(episodes):
            env.seed(episode)
            env.reset()
            done = 0
            while done < limit:
                observe()
                rng = np.random.default_rng(noise_seed(0, f"metaworld/{TASK}", episode, done // REPLAN))
                for action in rng.uniform(-1, 1, (REPLAN, 4)).astype(np.float32):
                    env.step(action)
                    done += 1
            steps += done
        results.put((steps, time.perf_counter() - start, time.process_time() - cpu))


def rollout(episodes: int, limit: int, workers: int) -> tuple[int, float, float]:
    """Steps, seconds and CPU seconds of a rollout whose environments are built already."""
    plan = Plan((REFERENCE,), episodes, 0, REPLAN, batch_size=4, limits={f"metaworld/{TASK}": limit})
    actor = RandomActor(4, REPLAN)
    actor.cameras = CAMERAS
    with Pool(workers) as pool, tempfile.TemporaryDirectory() as folder:
        pool.run({slot: Begin(REFERENCE, 0, slot, CAMERAS) for slot in range(plan.batch_size)})
        processes = [os.getpid(), *(worker.process.pid or 0 for worker in pool._workers)]
        found = Rollout(plan, actor, pool, Path(folder) / "out")
        start, cpu = time.perf_counter(), cpu_seconds(processes)
        found.run()
        return found.steps, time.perf_counter() - start, cpu_seconds(processes) - cpu


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare the harness with a plain loop of the simulator.")
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[tuple[int, float, float]]] = {}
    for _ in range(args.repeats):
        results = context.Queue()
        process = context.Process(target=plain, args=(args.episodes, args.limit, results))
        process.start()
        found.setdefault("plain loop", []).append(results.get())
        process.join()
        for workers in (1, 2):
            name = f"rollout, {workers} worker{'s' if workers > 1 else ''}"
            found.setdefault(name, []).append(rollout(args.episodes, args.limit, workers))
    print(f"{'':<20}{'steps':>7}{'steps/s':>9}{'CPU ms/step':>13}{'CPU':>9}")
    base = min(cpu / steps for steps, _, cpu in found["plain loop"])
    for name, runs in found.items():
        rate = max(steps / seconds for steps, seconds, _ in runs)
        cost = min(cpu / steps for steps, _, cpu in runs)
        print(f"{name:<20}{runs[0][0]:>7}{rate:>9.0f}{1e3 * cost:>13.2f}{cost / base - 1:>+9.1%}")


if __name__ == "__main__":
    main()
