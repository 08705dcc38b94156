"""All checks of a policy, in order of likelihood: `diagnose`."""

from __future__ import annotations

from collections.abc import Collection

from pi0.assets import Assets
from pi0.robots.pipeline import Pipeline
from pi0_eval.doctor.findings import LEVELS, Diagnosis, Finding, ordered
from pi0_eval.doctor.images import check_images
from pi0_eval.doctor.numbers import check_numbers
from pi0_eval.doctor.probes import Predictor, Probes, model_images, prompt_findings
from pi0_eval.doctor.recordings import Recording

CHECKS = {  # what --skip names, with the causes that each looks for
    "images": ("black", "frozen", "swapped", "orientation", "channels", "aspect", "fov", "brightness"),
    "prompts": ("prompt_cut", "prompt_unseen"),
    "numbers": ("delta", "gripper", "stats", "state", "rate", "horizon", "padding"),
    "inputs": ("ignores_images", "ignores_state", "ignores_prompt"),
    "steps": ("steps",),
    "precision": ("precision",),
    "jumps": ("jumps",),
    "fit": ("untrained",),
    "latency": ("latency",),
}
NEEDS_POLICY = ("inputs", "steps", "precision", "jumps", "fit", "latency")


def diagnose(
    assets: Assets,
    pipeline: Pipeline,
    seen: Recording,
    known: Recording | None = None,
    predictor: Predictor | None = None,
    *,
    replan: int | None = None,
    skip: Collection[str] = (),
    subject: str = "",
) -> Diagnosis:
    """Look for the causes of CAUSES in what a policy sees (`seen`), and in the policy itself.

    `known` is its training data, without which images and prompts are not compared; `predictor` the policy, without
    which nothing that needs its actions is judged; `replan` how many actions of a chunk are executed (default: all);
    `skip` has names of CHECKS. Raises ValueError for recordings that do not fit the robot.
    """
    if unknown := sorted(set(skip) - CHECKS.keys()):
        raise ValueError(f"unknown check {unknown[0]!r}; known are {', '.join(CHECKS)}")
    robot, found, facts, unjudged = pipeline.robot, list[Finding](), dict[str, str](), list[str]()
    before = pipeline.tokenizer.truncated, pipeline.tokenizer.encoded
    rows = [pipeline(frame, actions=False) for frame in seen.samples]
    counts = pipeline.tokenizer.truncated - before[0], pipeline.tokenizer.encoded - before[1]
    if "images" not in skip:
        trained = None
        if known is not None:
            trained = model_images([pipeline(frame, actions=False) for frame in known.samples])
        else:
            unjudged.append("cameras against training (order, colours, orientation, view, brightness): no --training")
        found += check_images(model_images(rows), trained, seen, known, robot)
    if "prompts" not in skip:
        found += prompt_findings(pipeline, counts, seen, known)
        unjudged += ["whether prompts were in training: no --training"] if known is None else []
    if "numbers" not in skip:
        found += check_numbers(assets, robot, seen, known)
        if known is None:
            unjudged.append("rate of control against training's: no --training")
        elif seen.fps is None:
            unjudged.append("rate of control: the frames are a server's requests")
        if (known or seen).actions is None:
            unjudged.append("norm stats of actions, relative or absolute, padding: no recorded actions")
    if predictor is None:
        unjudged.append(f"{', '.join(n for n in NEEDS_POLICY if n not in skip)}: no policy, only its files")
    else:
        more, named, missing = _ask(assets, pipeline, seen, known, predictor, replan, skip)
        found, facts, unjudged = found + more, facts | named, unjudged + missing
    merged = ordered(_merged(found))
    causes = {finding.cause for finding in merged}
    judged = [name for name in CHECKS if name not in skip and (predictor or name not in NEEDS_POLICY)]
    healthy = [name for name in judged if not causes & set(CHECKS[name])]
    return Diagnosis(subject, merged, healthy, [*unjudged, *(f"{name}: skipped" for name in skip)], facts)


def _ask(
    assets: Assets,
    pipeline: Pipeline,
    seen: Recording,
    known: Recording | None,
    predictor: Predictor,
    replan: int | None,
    skip: Collection[str],
) -> tuple[list[Finding], dict[str, str], list[str]]:
    """The checks that ask the policy: on frames of training where there are any, which it knows."""
    probes = Probes(predictor, pipeline, known or seen)
    found, facts, unjudged = list[Finding | None](), dict[str, str](), list[str]()
    if "numbers" not in skip:
        own = probes if known is None or seen.actions is None else Probes(predictor, pipeline, seen)
        found += [probes.first_actions(), own.signs()]
    if "inputs" not in skip:
        prompts = tuple(dict.fromkeys((*(known or seen).prompts, *seen.prompts)))
        told = assets.model.family.prompt != "state" or assets.state_in_prompt
        findings, named, missing = probes.dependence(prompts, state=told)
        found, facts, unjudged = [*found, *findings], facts | named, unjudged + missing
    if "steps" not in skip and predictor.num_steps is not None:
        finding, text = probes.steps()
        found, facts = [*found, finding], facts | {"more Euler steps": f"change the actions by {text} of their spread"}
    elif "steps" not in skip:
        unjudged.append("Euler steps: the policy takes none, or is on a server")
    if "precision" not in skip and predictor.dtype not in (None, "float32"):
        finding, text = probes.precision()
        found, facts = [*found, finding], facts | {"float32": f"changes the actions by {text} of their spread"}
    if "jumps" not in skip and len(probes.recording.later) >= 4 and probes.recording.fps is not None:
        finding, text = probes.jumps()
        found, facts = [*found, finding], facts | {"joints of chunks": text}
    elif "jumps" not in skip:
        unjudged.append("joints of chunks: no two frames of an episode are as far apart as two chunks")
    if "fit" not in skip and probes.recording.actions is not None:
        finding, text = probes.fit()
        found, facts = [*found, finding], facts | {"open-loop error": text}
    if "latency" not in skip:
        fps = seen.fps or (known.fps if known is not None else None)
        finding, text = probes.latency(fps, replan or assets.model.action_horizon)
        found, facts = [*found, finding], facts | {"latency": text}
    return [finding for finding in found if finding is not None], facts, unjudged


def _merged(findings: list[Finding]) -> list[Finding]:
    """One finding for each cause, with all its evidence."""
    by_cause: dict[str, Finding] = {}
    for f in sorted(findings, key=lambda f: f.level):
        if f.cause in by_cause:
            first = by_cause[f.cause]
            images, ranges = first.images | f.images, first.ranges + f.ranges
            by_cause[f.cause] = Finding(f.cause, first.level, f"{first.evidence} {f.evidence}", images, ranges)
        else:
            by_cause[f.cause] = f
    return list(by_cause.values())


def exit_code(diagnosis: Diagnosis) -> int:
    """1 where a cause is likely or very likely, else 0."""
    return int(any(finding.level < len(LEVELS) - 1 for finding in diagnosis.findings))
