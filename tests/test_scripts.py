"""The scripts for clusters: linted, validated, and run with stand-ins for the commands of the clusters."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
STAND_IN = """#!/usr/bin/env python3
import os, sys
log = os.environ["LOG"]
with open(log, "a") as file:
    file.write(os.path.basename(sys.argv[0]) + " " + " ".join(sys.argv[1:]).replace("\\n", " ") + "\\n")
line = " ".join(sys.argv[1:])
answers = open(log + ".answers").read().splitlines()
for i, answer in enumerate(answers):
    part, code, text = answer.split("|")
    if part in os.path.basename(sys.argv[0]) + " " + line:
        if code.endswith("!"):  # once
            open(log + ".answers", "w").write("\\n".join(answers[:i] + answers[i + 1 :]))
        print(text, end="")
        sys.exit(int(code.rstrip("!")))
"""


class Cluster:
    """A folder of stand-ins, which note how they are called and answer as told: (part of the call, exit code, text)."""

    def __init__(self, folder: Path):
        self.log = folder / "log"
        for name in ("gcloud", "srun", "scontrol"):
            (folder / name).write_text(STAND_IN)
            (folder / name).chmod(0o755)
        self._environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(self.log), "WAIT": "0"}

    def run(self, script: str, *arguments: str, answers: tuple[tuple[str, str, str], ...] = (), **environment: str):
        self.log.write_text("")
        Path(f"{self.log}.answers").write_text("\n".join("|".join(answer) for answer in answers))
        command = ["bash", str(SCRIPTS / script), *arguments]
        environment = self._environment | environment
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return result, self.log.read_text().splitlines()


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


POD = {"TPU": "pod", "ZONE": "z", "REPOSITORY": "https://host/pi0", "WORKDIR": "gs://bucket/runs/a b"}


@pytest.mark.parametrize("script", ["tpu_pod.sh", "slurm.sbatch"])
def test_shellcheck_finds_nothing(script: str) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("needs shellcheck, of the extra dev")
    result = subprocess.run([shellcheck, str(SCRIPTS / script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_a_pod_that_is_there(cluster: Cluster) -> None:
    result, calls = cluster.run("tpu_pod.sh", "--config", "debug", "--config.note=a b", **POD)
    assert result.returncode == 0, result.stderr
    install, train = calls
    assert "ssh pod --zone z --worker=all" in install and "pip install -q -e '.[jax,tpu,gcs]'" in install
    command = shlex.split(train.partition("--command ")[2])
    assert command == [
        *("cd", "pi0", "&&", ".venv/bin/pi0-train", "--workdir", "gs://bucket/runs/a b"),
        *("--compilation-cache", "gs://bucket/runs/compiled", "--config", "debug", "--config.note=a b"),
    ]


def test_a_pod_that_is_taken_and_asked_for_again(cluster: Cluster) -> None:
    answers = (
        ("describe", "1!", ""),  # there is none
        ("describe", "0!", "ACTIVE"),
        ("pi0-train", "143!", ""),
        ("describe", "0!", "SUSPENDED"),  # after the training, and when it is asked for again
        ("describe", "0!", "SUSPENDED"),
        ("describe", "1!", ""),
        ("describe", "0", "ACTIVE"),
    )
    result, calls = cluster.run("tpu_pod.sh", "--config", "debug", answers=answers, ACCELERATOR="v5litepod-16", **POD)
    assert result.returncode == 0, result.stderr
    kinds = ("create", "delete", "pip install", "pi0-train")
    done = [next((kind for kind in kinds if f"{kind} " in call), None) for call in calls]
    trained = ["pip install", "pi0-train"]
    assert [kind for kind in done if kind] == ["create", *trained, "delete", "create", *trained]
    assert sum("--spot" in call and "--accelerator-type v5litepod-16" in call for call in calls) == 2


def test_a_training_that_fails_is_not_repeated(cluster: Cluster) -> None:
    answers = (("describe", "0", "ACTIVE"), ("pi0-train", "1", ""))
    result, calls = cluster.run("tpu_pod.sh", answers=answers, ACCELERATOR="v5litepod-16", **POD)
    assert result.returncode == 1 and "the training failed" in result.stderr
    assert sum("pi0-train" in call for call in calls) == 1


@pytest.mark.parametrize(("code", "requeued"), [("0", False), ("143", True), ("1", False)])
def test_slurm(code: str, requeued: bool, cluster: Cluster, tmp_path: Path) -> None:
    answers = (("srun", code, ""),)
    environment = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    result, calls = cluster.run("slurm.sbatch", "--config", "debug", answers=answers, **environment)
    assert result.returncode == int(code)
    assert calls[0] == "srun --kill-on-bad-exit=1 .venv/bin/pi0-train --config debug"
    assert ("scontrol requeue 7" in calls) == requeued


def test_the_job_set_is_valid() -> None:
    """Its job template by the schema of Kubernetes; and it shares no volume between pods."""
    yaml = pytest.importorskip("yaml")
    validation = pytest.importorskip("kubernetes_validate", reason="needs the extra dev")
    (document,) = yaml.safe_load_all((SCRIPTS / "gke_jobset.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = document["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "pi0"}, "spec": replicated["template"]["spec"]}
    validation.validate(job, validation.latest_version(), strict=True)
    pod = job["spec"]["template"]["spec"]
    assert all("emptyDir" in volume for volume in pod["volumes"])
    args = dict(a.removeprefix("--").split("=", 1) for a in pod["containers"][0]["args"])
    assert args["workdir"].startswith("gs://")
    chips = job["spec"]["parallelism"] * pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert chips == int(args["config.mesh.fsdp"]) and int(args["config.batch_size"]) % chips == 0
    with pytest.raises(validation.ValidationError):
        validation.validate(job | {"spec": job["spec"] | {"paralelism": 4}}, validation.latest_version(), strict=True)
