"""The scripts under launch/: what they would do, and how they go on after a preemption."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import kubernetes_validate
import numpy as np
import pytest
import yaml
from test_waves import modules_of

from respodiff_jax.config import load_config
from respodiff_jax.training import train

ROOT = pathlib.Path(__file__).parents[1]
PATH = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
TRAIN = [
    "--config",
    "configs/smoke.py",
    "--workdir",
    "gs://b/run",
    "--config.x.name=a woman's $HOME",
]
TPU = [
    "--name",
    "gender",
    "--zone",
    "us-east5-b",
    "--type",
    "v6e-16",
    "--runtime",
    "v2-alpha-tpuv6e",
]
GKE = ["--name", "gender", "--image", "i:1", "--accelerator", "tpu-v6e-slice", "--topology", "4x4"]
SCRIPTS = sorted(ROOT.glob("launch/*.sh"))


def launch(script, *arguments, path=(), check=True, **options):
    """Runs a script; programs are looked for in the folder `path` first."""
    folders = [*map(str, path), PATH]
    return subprocess.run(
        [ROOT / "launch" / script, *arguments],
        env=os.environ | {"PATH": ":".join(folders)},
        cwd=ROOT,
        check=check,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def commands(text):
    return [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]


def program(folder, name, script):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/bash\n{script}\n")
    file.chmod(0o755)


def test_shellcheck_has_nothing_to_say():
    checker = pathlib.Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([checker, *SCRIPTS], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert len(SCRIPTS) >= 4


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("local_pod.sh", ["2", "2"]),
        ("local_pod.sh", ["--dry-run"]),
        ("slurm.sh", []),
        ("slurm.sh", ["--dry-run"]),
        ("tpu_pod.sh", TPU),
        ("tpu_pod.sh", [*TPU[2:], *TRAIN]),
        ("tpu_pod.sh", ["--name"]),
        ("gke.sh", GKE),
        ("gke.sh", [*GKE[2:], *TRAIN]),
    ],
)
def test_missing_arguments_get_the_usage(script, arguments, tmp_path):
    for name in ("gcloud", "kubectl", "srun"):
        program(tmp_path, name, "echo called; exit 9")
    done = launch(script, *arguments, path=[tmp_path], check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"launch/{script}" in done.stderr and "--dry-run" in done.stderr
    assert "set -euo" not in done.stderr


def test_slurm_runs_a_task_per_gpu(tmp_path):
    (command,) = commands(launch("slurm.sh", "--dry-run", "--config", "c.py").stdout)
    assert command == shlex.split(
        "srun --gpu-bind=none respodiff train --distributed auto --config c.py"
    )
    program(tmp_path, "srun", 'printf "%s\\n" "$@"')
    ran = launch("slurm.sh", *TRAIN, path=[tmp_path]).stdout.splitlines()
    assert ran[-len(TRAIN) :] == TRAIN


def test_local_pod_starts_its_processes():
    text = launch("local_pod.sh", "--dry-run", "3", "4", *TRAIN).stdout
    found = [line.split() for line in text.splitlines()]
    assert len(found) == 3 and len({line[line.index("--coordinator") + 1] for line in found}) == 1
    for number, command in zip((2, 1, 0), commands(text), strict=True):
        assert command[:2] == [
            "JAX_PLATFORMS=cpu",
            "XLA_FLAGS=--xla_force_host_platform_device_count=4",
        ]
        assert command[2:6] == ["python3", "-m", "respodiff_jax", "train"]
        assert command[6 : 6 + len(TRAIN)] == TRAIN
        assert command[-5:] == ["--num-processes", "3", "--process-id", str(number), "&"]


@contextlib.contextmanager
def in_training(tmp_path, processes, *arguments, checkpoint_every=10**6):
    """A pod of processes with two devices each, in training: the script's process, and theirs by
    their numbers."""
    options = {
        "train.steps": 10**6,
        "checkpoint.every": checkpoint_every,
        "log.every": 1,
        "log.grid_every": 0,
    }
    overrides = [f"--config.{key}={value}" for key, value in options.items()]
    workdir = ["--config", "configs/smoke.py", "--workdir", str(tmp_path / "run")]
    with open(tmp_path / "output", "wb") as output:
        process = subprocess.Popen(
            [
                ROOT / "launch" / "local_pod.sh",
                str(processes),
                "2",
                *workdir,
                *overrides,
                *arguments,
            ],
            env=os.environ | {"PATH": PATH},
            cwd=ROOT,
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 900
        while not _has_begun(tmp_path / "run"):
            assert process.poll() is None and time.monotonic() < deadline, told(tmp_path)
            time.sleep(0.5)
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        found = {}
        for number in map(int, children.split()):
            line = pathlib.Path(f"/proc/{number}/cmdline").read_text().split("\0")
            found[int(line[line.index("--process-id") + 1])] = number
        yield process, found
    finally:
        process.terminate()
        process.wait(timeout=400)


def _has_begun(workdir):
    return any(path.read_text().count("\n") >= 3 for path in workdir.rglob("metrics.jsonl"))


@pytest.fixture
def pod(tmp_path):
    """A pod of two processes in training; see `in_training`."""
    with in_training(tmp_path, 2) as started:
        yield started


def told(tmp_path):
    return (tmp_path / "output").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_is_killed_the_other_ends_and_says_so(pod, tmp_path, victim):
    process, numbers = pod
    os.kill(numbers[victim], signal.SIGKILL)
    assert process.wait(timeout=200) != 0
    message = re.search(r"a process failed with status \d+; logs in (.*)", told(tmp_path))
    texts = [told(tmp_path), pathlib.Path(message[1], "pod_1.log").read_text()]
    assert re.search("another task died|Connection (closed|reset) by peer", texts[1 - victim])


@pytest.mark.slow
def test_when_a_process_is_told_to_stop_all_save_and_more_go_on(pod, tmp_path):
    """Two processes, of which one is told, then four, train as one process does."""
    process, numbers = pod
    os.kill(numbers[1], signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    saved = int(re.search(r"stopped at step (\d+), saved", told(tmp_path))[1])
    few = [f"--config.train.steps={saved + 2}", "--config.log.grid_every=0"]
    arguments = ["--config", "configs/smoke.py", "--workdir", str(tmp_path / "run"), *few]
    assert f"continuing at step {saved}" in launch("local_pod.sh", "4", "2", *arguments).stdout
    train(load_config("configs/smoke.py", few), str(tmp_path / "one"))
    assert_same_modules(tmp_path / "run", tmp_path / "one")


def assert_same_modules(workdir, other):
    """Of all concepts, to float tolerance."""
    ours, theirs = modules_of(workdir), modules_of(other)
    assert list(ours) == list(theirs)
    for name, parts in ours.items():
        for a, b in zip(parts, theirs[name], strict=True):
            assert np.linalg.norm(b) > 0 and np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b), name


@pytest.mark.slow
def test_a_killed_pod_goes_on_with_fewer_processes(tmp_path):
    """Four processes, of which one is killed, then two, train two waves as one process does."""
    file, workdir = tmp_path / "concepts.jsonl", tmp_path / "run"
    row = {"group": "numbers", "neutral_prompts": ["a person"], "lr_sam": 0.01}
    rows = [row | {"name": f"{i}", "target_prompt": f"the number {i}"} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = ["--config.train.batch_size=1", "--config.train.concepts_per_device=1"]
    concepts = ["--concepts", str(file)]

    def saved_steps():  # without one that is being written, which the kill may cut off
        names = [path.name for path in workdir.glob("waves/0000/checkpoints/*")]
        return [int(name) for name in names if name.isdigit()]

    with in_training(tmp_path, 4, *few, *concepts, checkpoint_every=2) as (process, numbers):
        deadline = time.monotonic() + 300
        while not saved_steps():
            assert process.poll() is None and time.monotonic() < deadline, told(tmp_path)
            time.sleep(0.1)
        os.kill(numbers[3], signal.SIGKILL)
        assert process.wait(timeout=300) != 0
    saved = max(saved_steps())
    few += [f"--config.train.steps={saved + 2}", "--config.log.grid_every=0"]
    arguments = ["--config", "configs/smoke.py", "--workdir", str(workdir), *concepts, *few]
    output = launch("local_pod.sh", "2", "2", *arguments).stdout
    assert f"step {saved}" in output
    train(load_config("configs/smoke.py", few, str(file)), str(tmp_path / "one"))
    assert_same_modules(workdir, tmp_path / "one")
    assert list(modules_of(workdir)) == [row["name"] for row in rows]


LEAVING = """
import sys, time
import jax
from jax.experimental import multihost_utils
from respodiff_jax import parallel

port, process_id = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_platforms", "cpu")
parallel.LEAVE_SECONDS = 2
parallel.initialize_distributed(f"localhost:{port}", 2, process_id)
with parallel.leaving_on_error():
    multihost_utils.sync_global_devices("begun")
    if process_id == 1:
        raise ValueError("no space left on this host")
    multihost_utils.sync_global_devices("never")
"""


def test_a_process_that_fails_does_not_wait_for_those_that_wait_for_it():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVING, str(port), str(number)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    texts = [process.communicate(timeout=240)[1] for process in processes]  # JAX's is 300 s
    assert processes[1].returncode == 1 and "no space left on this host" in texts[1]
    assert processes[0].returncode != 0


def test_tpu_pod_tells_what_it_would_do(tmp_path):
    program(tmp_path, "gcloud", "echo called")
    options = ("--dry-run", "--spot", "--slices", "2", "--delete", "--restarts", "3")
    text = launch("tpu_pod.sh", *TPU, *options, *TRAIN, path=[tmp_path]).stdout
    assert "at most 3 times" in text
    create, copy, install, train, renew, end = commands(text)
    for command in (create, copy, install, train, renew, end):
        assert command[:4] == ["gcloud", "compute", "tpus", "queued-resources"]
        assert command[-2:] == ["--zone", "us-east5-b"]
    assert " ".join(create[4:-2]) == (
        "create gender --node-prefix gender --node-count 2 --accelerator-type v6e-16"
        " --runtime-version v2-alpha-tpuv6e --spot"
    )
    assert copy[4:-2] == ["scp", "respodiff_jax.tar.gz", "gender:", "--node=all", "--worker=all"]
    assert renew == end and renew[4:-2] == ["delete", "gender", "--force", "--quiet"]
    for command in (install, train):
        assert command[4:9] == ["ssh", "gender", "--node=all", "--worker=all", "--command"]
    single = commands(launch("tpu_pod.sh", *TPU, "--dry-run", *TRAIN).stdout)
    assert single[0][5:8] == ["gender", "--node-id", "gender"] and "--spot" not in single[0]


@pytest.fixture
def cloud(tmp_path):
    """A `gcloud` that keeps a queued resource's state in a file and reads from others how each
    training ends, and a `sleep` that does not."""
    program(tmp_path, "sleep", "true")
    program(
        tmp_path,
        "gcloud",
        rf"""
cd {tmp_path}
echo "${{@:4:1}}" >> calls
case $4 in
  describe)
    state=$(cat state 2>/dev/null) || {{ echo "ERROR: NOT_FOUND: Resource" >&2; exit 1; }}
    echo "$state"
    case $state in WAITING_FOR_RESOURCES) echo ACTIVE > state ;; esac
    ;;
  create) echo WAITING_FOR_RESOURCES > state ;;
  delete) rm state ;;
  scp) tar -tzf "$5" > sent ;;
  ssh)
    [[ $* == *"respodiff train"* ]] || exit 0
    read -r status state < ends; sed -i 1d ends
    echo "$state" > state
    exit "$status"
    ;;
esac""",
    )
    return tmp_path


def trained(cloud, ends, *options):
    """What the script says and its status, when trainings end so, "STATUS STATE" each."""
    (cloud / "ends").write_text("".join(f"{end}\n" for end in ends))
    done = launch("tpu_pod.sh", *TPU, *options, *TRAIN, path=[cloud], check=False)
    calls = [call for call in (cloud / "calls").read_text().split() if call != "describe"]
    return done, calls


ATTEMPT = ["scp", "ssh", "ssh"]


def test_tpu_pod_requests_installs_trains_and_deletes(cloud):
    done, calls = trained(cloud, ["0 ACTIVE"], "--delete")
    assert (done.returncode, calls) == (0, ["create", *ATTEMPT, "delete"])
    assert "configs/smoke.py" in (cloud / "sent").read_text().splitlines()


def test_tpu_pod_takes_what_is_there_and_leaves_it(cloud):
    (cloud / "state").write_text("ACTIVE")
    done, calls = trained(cloud, ["0 ACTIVE"])
    assert (done.returncode, calls) == (0, ATTEMPT)


def test_tpu_pod_goes_on_after_a_preemption_and_a_lost_host(cloud):
    done, calls = trained(cloud, ["143 SUSPENDED", "134 ACTIVE", "0 ACTIVE"])
    again = ["delete", "create", *ATTEMPT]
    assert (done.returncode, calls) == (0, ["create", *ATTEMPT, *again, *ATTEMPT])


def test_tpu_pod_does_not_repeat_a_mistake(cloud):
    done, calls = trained(cloud, ["2 ACTIVE", "0 ACTIVE"])
    assert (done.returncode, calls) == (2, ["create", *ATTEMPT])


def test_tpu_pod_ends_after_so_many_restarts(cloud):
    done, calls = trained(cloud, ["255 SUSPENDED"] * 3, "--restarts", "1")
    assert (done.returncode, calls.count("create")) == (255, 2)
    assert "status 255 after 1 restart" in done.stderr


def test_tpu_pod_tells_of_a_request_that_failed(cloud):
    (cloud / "state").write_text("FAILED")
    done, calls = trained(cloud, [])
    assert (done.returncode, calls) == (1, [])
    assert "queued-resources describe gender" in done.stderr


def manifest(*options):
    return yaml.safe_load(launch("gke.sh", *GKE, "--dry-run", *options, *TRAIN).stdout)


def check_job(spec):
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": spec}
    kubernetes_validate.validate(job, "1.31", strict=True)


def test_the_manifest_is_valid_and_as_told():
    found = manifest("--slices", "2", "--restarts", "7", "--service-account", "trainer")
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["metadata"] == {
        "name": "gender",
        "annotations": {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        },
    }
    assert set(found["spec"]) == {"failurePolicy", "replicatedJobs"}
    policy = found["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert policy["rules"] == [
        {
            "name": "mistake",
            "action": "FailJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
        }
    ]
    (jobs,) = found["spec"]["replicatedJobs"]
    assert (jobs["name"], jobs["replicas"], set(jobs["template"])) == ("slice", 2, {"spec"})
    job = jobs["template"]["spec"]
    check_job(job)
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert (pod["restartPolicy"], pod["serviceAccountName"]) == ("Never", "trainer")
    (container,) = pod["containers"]
    assert container["name"] == job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["args"] == TRAIN


def test_the_check_of_the_manifest_finds_mistakes():
    job = manifest()["spec"]["replicatedJobs"][0]["template"]["spec"]
    for broken in (job | {"backoffLimits": 1}, job | {"completions": "four"}):
        with pytest.raises(kubernetes_validate.ValidationError):
            check_job(broken)


def test_a_topology_is_so_many_hosts():
    for options, hosts in ([("--topology", "2x2x4"), 4], [("--chips-per-host", "8"), 2]):
        job = manifest(*options)["spec"]["replicatedJobs"][0]["template"]["spec"]
        assert job["completions"] == hosts
    options = ("--chips-per-host", "3", "--dry-run", *TRAIN)
    done = launch("gke.sh", *GKE, *options, check=False)
    assert done.returncode == 2 and "4x4 has 16 chips" in done.stderr


def test_gke_applies_the_manifest(tmp_path):
    program(tmp_path, "kubectl", f'[[ "$*" == "apply --filename -" ]] && cat > {tmp_path}/applied')
    launch("gke.sh", *GKE, *TRAIN, path=[tmp_path])
    assert yaml.safe_load((tmp_path / "applied").read_text()) == manifest()


def start_host(tmp_path, respodiff):
    """What a host of a TPU pod runs, with this shell script for the training."""
    for name in ("pkill", "pgrep"):  # which find nothing of an earlier start
        program(tmp_path, name, "false")
    program(tmp_path / "respodiff_venv" / "bin", "respodiff", respodiff)
    (tmp_path / "respodiff_jax").mkdir()
    *_, train, _ = commands(launch("tpu_pod.sh", *TPU, "--dry-run", *TRAIN).stdout)
    command = train[train.index("--command") + 1]
    path = f"{tmp_path}:{os.environ['PATH']}"
    return subprocess.Popen(["bash", "-c", command], cwd=tmp_path, env=os.environ | {"PATH": path})


def start_container(tmp_path, respodiff):
    """The container's process, with this shell script for the command that it runs."""
    program(tmp_path, "respodiff", respodiff)
    (container,) = manifest()["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ]
    path = f"{tmp_path}:{os.environ['PATH']}"
    return subprocess.Popen(
        [*container["command"], *container["args"]], env=os.environ | {"PATH": path}
    )


STARTS = pytest.mark.parametrize("start", [start_host, start_container])


@STARTS
@pytest.mark.parametrize("status", [0, 2])
def test_a_host_ends_as_its_program_does(tmp_path, start, status):
    done = f'printf "%s\\n" "$@" > {tmp_path}/arguments; exit {status}'
    assert start(tmp_path, done).wait(timeout=30) == status
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments == ["train", "--distributed", "auto", *TRAIN]


@STARTS
def test_a_host_that_is_told_to_stop_saves_and_says_that_it_is_not_done(tmp_path, start):
    saves = f"""
trap 'sleep 1; touch {tmp_path}/saved; exit 0' TERM
touch {tmp_path}/running
while true; do sleep 0.1; done"""
    process = start(tmp_path, saves)
    deadline = time.monotonic() + 30
    while not (tmp_path / "running").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    if start is start_host:  # as when it is shut down
        process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=30) == 143
    assert (tmp_path / "saved").exists()


def test_the_page_shows_commands_that_the_scripts_take(tmp_path):
    """Each of docs/clusters.md, with --dry-run."""
    text = (ROOT / "docs" / "clusters.md").read_text().replace("\\\n", " ")
    shown = re.findall(r"(launch/\w+\.sh) ([^`\n]*--config[^`\n]*)", text)
    assert {script for script, _ in shown} == {f"launch/{path.name}" for path in SCRIPTS} - {
        "launch/newest_torch.sh"
    }
    for script, arguments in shown:
        assert launch(pathlib.Path(script).name, "--dry-run", *shlex.split(arguments)).stdout
