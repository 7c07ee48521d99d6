"""The scripts in launch/: the commands they run, and when they restart a run."""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import kubernetes_validate
import pytest
import yaml

from respodiff_jax import cli

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
    """Runs a script, which finds programs in the folders `path` first."""
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
    """Writes a stand-in for a program."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/bash\n{script}\n")
    file.chmod(0o755)


def test_shellcheck_finds_nothing():
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
def test_missing_arguments_print_the_usage(script, arguments, tmp_path):
    for name in ("gcloud", "kubectl", "srun"):
        program(tmp_path, name, "echo called; exit 9")
    done = launch(script, *arguments, path=[tmp_path], check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"launch/{script}" in done.stderr and "--dry-run" in done.stderr
    assert "set -euo" not in done.stderr


def test_slurm_starts_a_task_per_gpu(tmp_path):
    (command,) = commands(launch("slurm.sh", "--dry-run", "--config", "c.py").stdout)
    assert command == shlex.split(
        "srun --gpu-bind=none --kill-on-bad-exit=0 respodiff train --distributed auto --config c.py"
    )
    program(tmp_path, "srun", 'printf "%s\\n" "$@"')
    ran = launch("slurm.sh", *TRAIN, path=[tmp_path]).stdout.splitlines()
    assert ran[-len(TRAIN) :] == TRAIN


@pytest.mark.parametrize("status", [0, 1, 2, 75])
def test_slurm_queues_only_an_interrupted_job_again(tmp_path, monkeypatch, status):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    program(tmp_path, "srun", f"exit {status}")
    program(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/called')
    done = launch("slurm.sh", *TRAIN, path=[tmp_path], check=False)
    assert done.returncode == status
    called = tmp_path / "called"
    assert (called.read_text() if called.exists() else "") == "requeue 7\n" * (status == 75)


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [((0, 0), 0), ((75, 75), 75), ((75, 0), 75), ((75, 1), 1), ((134, 75), 134)],
)
def test_local_pod_passes_the_status_on(tmp_path, statuses, expected):
    ends = " ".join(map(str, statuses))
    python = f'ends=({ends}); if [[ $1 == -c ]]; then echo 1; else exit "${{ends[${{@: -1}}]}}"; fi'
    program(tmp_path, "python3", python)
    done = launch("local_pod.sh", "2", "1", *TRAIN, path=[tmp_path], check=False)
    assert done.returncode == expected
    assert ("a process failed" in done.stderr) == (expected not in (0, 75))


def test_local_pod_starts_all_processes():
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


def test_tpu_pod_dry_run_prints_all_commands(tmp_path):
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
    """A folder with stand-ins for `gcloud` and `sleep`; the latter returns at once.

    The file `state` has the state of the queued resource, each line of `ends` the status of a
    training and the state after it. `gcloud` appends its calls to `calls`.
    """
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
    """Runs the script, with an end "STATUS STATE" for each training; returns it and the calls."""
    (cloud / "ends").write_text("".join(f"{end}\n" for end in ends))
    done = launch("tpu_pod.sh", *TPU, *options, *TRAIN, path=[cloud], check=False)
    calls = [call for call in (cloud / "calls").read_text().split() if call != "describe"]
    return done, calls


ATTEMPT = ["scp", "ssh", "ssh"]


def test_tpu_pod_requests_installs_trains_and_deletes(cloud):
    done, calls = trained(cloud, ["0 ACTIVE"], "--delete")
    assert (done.returncode, calls) == (0, ["create", *ATTEMPT, "delete"])
    assert "configs/smoke.py" in (cloud / "sent").read_text().splitlines()


def test_tpu_pod_uses_an_existing_resource_and_keeps_it(cloud):
    (cloud / "state").write_text("ACTIVE")
    done, calls = trained(cloud, ["0 ACTIVE"])
    assert (done.returncode, calls) == (0, ATTEMPT)


def test_tpu_pod_restarts_after_preemption_interruption_and_lost_host(cloud):
    done, calls = trained(cloud, ["75 SUSPENDED", "75 ACTIVE", "134 ACTIVE", "0 ACTIVE"])
    again = ["delete", "create", *ATTEMPT]
    assert (done.returncode, calls) == (0, ["create", *ATTEMPT, *again, *ATTEMPT, *ATTEMPT])


def test_tpu_pod_does_not_restart_after_status_2(cloud):
    done, calls = trained(cloud, ["2 ACTIVE", "0 ACTIVE"])
    assert (done.returncode, calls) == (2, ["create", *ATTEMPT])


def test_tpu_pod_stops_after_the_maximum_number_of_restarts(cloud):
    done, calls = trained(cloud, ["255 SUSPENDED"] * 3, "--restarts", "1")
    assert (done.returncode, calls.count("create")) == (255, 2)
    assert "status 255 after 1 restart" in done.stderr


def test_tpu_pod_gives_up_when_gcloud_fails(cloud):
    program(cloud, "gcloud", "echo 'ERROR: no credentials' >&2; exit 1")
    done = launch("tpu_pod.sh", *TPU, *TRAIN, path=[cloud], check=False)
    assert done.returncode == 1 and done.stderr.count("no credentials") == 20


def test_tpu_pod_reports_a_failed_request(cloud):
    (cloud / "state").write_text("FAILED")
    done, calls = trained(cloud, [])
    assert (done.returncode, calls) == (1, [])
    assert "queued-resources describe gender" in done.stderr


def manifest(*options):
    return yaml.safe_load(launch("gke.sh", *GKE, "--dry-run", *options, *TRAIN).stdout)


def check_job(spec):
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": spec}
    kubernetes_validate.validate(job, "1.31", strict=True)


def test_gke_manifest_is_valid_and_follows_the_options():
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
    assert pod["shareProcessNamespace"]
    (container,) = pod["containers"]
    assert container["name"] == job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["args"] == TRAIN


def test_manifest_check_finds_mistakes():
    job = manifest()["spec"]["replicatedJobs"][0]["template"]["spec"]
    for broken in (job | {"backoffLimits": 1}, job | {"completions": "four"}):
        with pytest.raises(kubernetes_validate.ValidationError):
            check_job(broken)


def test_gke_number_of_hosts_follows_from_the_topology():
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
    """Starts what a host of a TPU pod runs, with a shell script in place of `respodiff`."""
    for name in ("pkill", "pgrep"):  # which find no earlier run
        program(tmp_path, name, "false")
    program(tmp_path / "respodiff_venv" / "bin", "respodiff", respodiff)
    (tmp_path / "respodiff_jax").mkdir()
    *_, train, _ = commands(launch("tpu_pod.sh", *TPU, "--dry-run", *TRAIN).stdout)
    command = train[train.index("--command") + 1]
    path = f"{tmp_path}:{os.environ['PATH']}"
    return subprocess.Popen(["bash", "-c", command], cwd=tmp_path, env=os.environ | {"PATH": path})


def start_container(tmp_path, respodiff):
    """Starts what a container runs, with a shell script in place of `respodiff`."""
    program(tmp_path, "respodiff", respodiff)
    (container,) = manifest()["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ]
    path = f"{tmp_path}:{os.environ['PATH']}"
    return subprocess.Popen(
        [*container["command"], *container["args"]], env=os.environ | {"PATH": path}
    )


def wait_for(file):
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


STARTS = pytest.mark.parametrize("start", [start_host, start_container])


@STARTS
@pytest.mark.parametrize("status", [0, 2, 75])
def test_host_ends_with_the_status_of_the_run(tmp_path, start, status):
    done = f'printf "%s\\n" "$@" > {tmp_path}/arguments; exit {status}'
    assert start(tmp_path, done).wait(timeout=30) == status
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments == ["train", "--distributed", "auto", *TRAIN]


@STARTS
def test_host_that_is_told_to_stop_saves_and_ends_with_status_75(tmp_path, start):
    saves = f"""
trap 'sleep 1; touch {tmp_path}/saved; exit 75' TERM
touch {tmp_path}/running
while true; do sleep 0.1; done"""
    process = start(tmp_path, saves)
    wait_for(tmp_path / "running")
    process.send_signal(signal.SIGTERM)
    if start is start_host:  # a host that shuts down sends both
        process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "saved").exists()


@STARTS
def test_host_that_is_told_to_stop_while_it_starts_ends_at_once(tmp_path, start):
    process = start(tmp_path, f"touch {tmp_path}/running; while true; do sleep 0.1; done")
    wait_for(tmp_path / "running")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM


def test_gpu_figures_go_on_after_a_benchmark_that_fails_and_say_so(tmp_path):
    program(tmp_path / "bin", "nvidia-smi", "echo name, H200")
    fails = """[[ $* == *train_sd14* ]] && { echo no memory >&2; exit 1; }; echo "| $2 |" """
    program(tmp_path / "bin", "respodiff", fails)
    out = tmp_path / "figures"
    done = launch("gpu_figures.sh", out, path=[tmp_path / "bin"], check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == f"train_sd14 failed with status 1, see {out}/train_sd14.log"
    assert (out / "train_sd14.log").read_text() == "no memory\n"
    assert (out / "generate_sdxl.md").read_text() == "| generate |\n"
    ran = [line.split(": ", 1)[1] for line in done.stdout.splitlines() if "at most" in line]
    assert sum(int(s) for s in re.findall(r"at most (\d+) s", done.stdout)) <= 12 * 60
    for command in ran:
        args = shlex.split(command)[1:]
        assert args[args.index("--out") + 1].endswith(".json")
        _, overrides = cli._parser().parse_known_args(args)
        assert all(word.startswith("--config.") for word in overrides)


def test_scripts_accept_the_commands_in_the_docs(tmp_path):
    """Each command of docs/clusters.md, with --dry-run."""
    text = (ROOT / "docs" / "clusters.md").read_text().replace("\\\n", " ")
    shown = re.findall(r"(launch/\w+\.sh) ([^`\n]*--config[^`\n]*)", text)
    assert {script for script, _ in shown} == {f"launch/{path.name}" for path in SCRIPTS} - {
        "launch/newest_torch.sh",
        "launch/gpu_figures.sh",
    }
    for script, arguments in shown:
        assert launch(pathlib.Path(script).name, "--dry-run", *shlex.split(arguments)).stdout
