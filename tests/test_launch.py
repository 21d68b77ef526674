"""Runs of several processes, started here, and the files that start them elsewhere."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"

CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=""):
    stage = dict(
        epochs=2,
        optimizer=dict(name="sgd", learning_rate=0.05),
    )
    return ConfigDict(dict(
        run=("teacher", "student"),
        networks=dict(
            teacher=dict(name="jaxkd_test_launch_network:make"),
            student=dict(name="jaxkd_test_launch_network:make"),
        ),
        data=dict(source="digits", batch_size=120, augment=dict(pad_crop=1)),
        stages=dict(
            teacher=dict(method=dict(ce=dict()), **stage),
            student=dict(
                teachers=("teacher",),
                method=dict(ce=dict(weight=0.1), kd=dict(weight=0.9)),
                **stage,
            ),
        ),
        mesh=dict(fsdp=2, fsdp_min_size=64),
        checkpoint=dict(every_steps=4),
        log=dict(every_steps=2),
    ))
"""
# What processes exchange does not depend on the network; this one compiles at once.
NETWORK = """
import flax.linen as nn
from jaxkd.layers import BatchNorm, Outputs

class Small(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.relu(BatchNorm()(nn.Conv(8, (3, 3), strides=2)(images), train))
        return Outputs(logits=nn.Dense(self.num_classes)(x.mean((1, 2))), taps={})

def make(*, num_classes):
    return Small(num_classes)
"""
STEPS = 22
ALONE = "--config.mesh.fsdp=1"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(CONFIG)
    (path.parent / "jaxkd_test_launch_network.py").write_text(NETWORK)
    return path


@pytest.fixture(scope="module")
def environment(config, tmp_path_factory):
    """Two simulated devices in each process, and a cache of compiled programs."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{config.parent}",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "GRACE": "1",
    }


def start(environment, *command, processes=1, **variables):
    launch = [str(LAUNCH / "local.sh"), str(processes)] if processes > 1 else []
    return subprocess.Popen(
        [*launch, *map(str, command)],
        cwd=ROOT,
        env={**environment, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process, status):
    try:
        out, err = process.communicate(timeout=200)
    finally:
        # Whatever a failing test leaves behind ends here.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert process.returncode == status, err
    # Gloo, which connects processes on CPUs, tells of it on standard output.
    lines = out.splitlines(keepends=True)
    # The lines of two processes may run into each other.
    kept = (x for x in lines if "[Gloo]" not in x and "peer ranks" not in x)
    return "".join(kept), err


def command(config, workdir, *arguments):
    main = [sys.executable, "-m", "jaxkd.main"]
    return [*main, f"--config={config}", f"--workdir={workdir}", *arguments]


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def one(config, environment, tmp_path_factory):
    """The whole run in one process with four devices."""
    workdir = tmp_path_factory.mktemp("runs") / "one"
    finish(start(environment, *command(config, workdir), JAX_NUM_CPU_DEVICES="4"), 0)
    return workdir


@pytest.fixture(scope="module")
def two(config, environment, tmp_path_factory):
    """Two processes, stopped in the second stage; then one goes on with one device."""
    workdir = tmp_path_factory.mktemp("runs") / "two"
    process = start(environment, *command(config, workdir), processes=2)
    folder = workdir / "checkpoints" / "student"
    deadline = time.monotonic() + 200
    while not (folder / "4").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no checkpoint of the student"
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    stopped = finish(process, 75)
    saved = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    again = start(
        environment, *command(config, workdir, ALONE), JAX_NUM_CPU_DEVICES="1"
    )
    return workdir, stopped, saved, finish(again, 0)


def test_two_processes_give_the_numbers_of_one(one, two):
    workdir, _, saved, _ = two
    expected, found = (
        [r for r in records(path) if r["kind"] == "train"] for path in (one, workdir)
    )
    assert [(r["stage"], r["step"]) for r in found if r["step"] % 2 == 0] == [
        (stage, step) for stage in ("teacher", "student") for step in range(2, 23, 2)
    ]
    assert 4 <= saved < STEPS
    # Rounding differs and grows with the steps.
    for a, b in zip(expected[:4], found[:4], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    student = len(expected) // 2
    for a, b in zip(expected[student:], found[student:], strict=False):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)


def test_only_the_first_process_speaks(two):
    _, (out, err), saved, _ = two
    assert out == ""
    assert err.count("teacher: compiled") == 1
    assert err.count("stopped by SIGTERM in stage 'student'") == 1
    assert f"after step {saved} of {STEPS}" in err


def test_one_process_goes_on_where_two_stopped(one, two):
    workdir, _, saved, (out, err) = two
    assert f"student: resumed at step {saved}" in err and "report:" in out
    summaries = [json.loads((p / "summary.json").read_text()) for p in (one, workdir)]
    assert [s["status"] for s in summaries] == ["finished", "finished"]
    assert summaries[0]["device"] == "4 x cpu (simulated on one host)"
    assert summaries[1]["device"] == "4 x cpu in 2 processes"
    for network in ("teacher", "student"):
        a, b = (s["results"][network]["accuracy"] for s in summaries)
        assert a == pytest.approx(b, abs=0.05)


def test_one_process_evaluates_what_two_trained(config, environment, two):
    workdir = two[0]
    before = json.loads((workdir / "summary.json").read_text())["results"]["teacher"]
    arguments = command(config, workdir, ALONE, "--mode=eval")
    finish(start(environment, *arguments, JAX_NUM_CPU_DEVICES="1"), 0)
    after = json.loads((workdir / "summary.json").read_text())["results"]["teacher"]
    # Two processes had evaluated the teacher, one does now.
    assert after["accuracy"] == pytest.approx(before["accuracy"], abs=1e-6)
    assert after["nll"] == pytest.approx(before["nll"], rel=1e-4)


PROBE = """
import json, os, sys
import jax
import numpy as np
from jaxkd import main
from jaxkd.training import Plan, distributed, load_config, make_setup, sharding
from jaxkd.training.batches import train_batches
from jaxkd.training.schema import ConfigError

distributed.connect(distributed.parse_processes(None, os.environ))
me, config, folder = jax.process_index(), *sys.argv[1:]
found = {}

def run():
    setup = make_setup(Plan.from_config(load_config(config)))
    batches = train_batches(setup, setup.stages[0])
    found["index"] = [batches[step]["index"].tolist() for step in range(3)]
    put = sharding.put_batch(batches[0], setup.mesh)
    found["sum"] = int(jax.jit(lambda x: x.astype("int32").sum())(put["index"]))
    # Both processes compute parts of the same layers, on the same records.
    shared = sharding.make_mesh(model=4)
    found["part"] = sharding.process_part(shared)
    put = sharding.put_batch({"x": np.arange(6.0)}, shared)["x"]
    found["shared"] = float(jax.jit(lambda x: x.sum())(put))
    # Split over all processes, and then whole on each.
    split = sharding.batch_sharding(setup.mesh)
    split = jax.jit(lambda: jax.numpy.arange(8.0), out_shardings=split)()
    whole = jax.device_put(split, sharding.replicated(setup.mesh))
    found["whole"] = np.asarray(whole).tolist()
    distributed.check_same("the same", 1)
    try:
        distributed.check_same("config: differs", me)
    except ConfigError as error:
        found["error"] = str(error)
    with open(f"{folder}/{me}.json", "w") as file:
        json.dump(found, file)
    if me:
        return main._failure("no memory")
    distributed.check_same("never reached by the other", 1)
    return 0

sys.exit(main._run_with_others(run))
"""


def test_processes_read_disjoint_parts_agree_and_do_not_wait_for_the_dead(
    config, environment, tmp_path
):
    probe = [sys.executable, "-c", PROBE, config, tmp_path]
    out, err = finish(start(environment, *probe, processes=2, GRACE="60"), 1)
    assert out == ""
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in (0, 1))
    for a, b in zip(first["index"], second["index"], strict=True):
        assert len(a) == len(b) == 60 and not set(a) & set(b)
    total = sum(first["index"][0]) + sum(second["index"][0])
    assert first["sum"] == second["sum"] == total
    for found in (first, second):
        assert found["part"] == [0, 1] and found["shared"] == 15.0
        assert found["whole"] == list(range(8))
        assert found["error"] == (
            "config: differs; process 1 has something else than process 0"
        )
    # The one that fails says why; the other learns of it and ends as well.
    assert "process 1 of 2: error: no memory\n" in err
    assert "process 0 of 2: error: " in err and "another process may have ended" in err


def test_processes_with_other_commands_end_in_one_line_each(
    config, environment, tmp_path
):
    line = " ".join(command(config, tmp_path / "run", "--config.seed=$JAX_PROCESS_ID"))
    process = start(environment, "bash", "-c", f"exec {line}", processes=2)
    out, err = finish(process, 2)
    assert out == "" and "Traceback" not in err
    text = "config: every process must run the same command; process 1 has something"
    for i in (0, 1):
        assert f"process {i} of 2: error: {text} else than process 0\n" in err
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------ the scripts


@pytest.mark.parametrize("script", sorted(p.name for p in LAUNCH.glob("*.sh")))
def test_scripts_are_shell_executable_and_documented(script):
    path = LAUNCH / script
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert os.access(path, os.X_OK)
    first, *_ = re.split(r"\nset -euo pipefail\n", path.read_text())
    lines = first.splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert all(line.startswith("#") for line in lines)
    assert f"launch/{script}" in first
    assert f"`{script}`" in (LAUNCH / "README.md").read_text()


def shell(*arguments, **variables):
    """Runs a script of launch/ with the variables alone and a PATH."""
    script, *rest = arguments
    return subprocess.run(
        ["bash", str(LAUNCH / script), *rest],
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("arguments", [(), ("2",), ("0", "true"), ("two", "true")])
def test_local_says_how_it_is_used(arguments):
    done = shell("local.sh", *arguments)
    assert done.returncode == 2 and done.stderr.startswith("usage: launch/local.sh")


def test_local_numbers_its_processes():
    line = "echo $JAX_PROCESS_ID/$JAX_NUM_PROCESSES/$JAX_LOCAL_DEVICE_IDS"
    line += "/$JAX_COORDINATOR_ADDRESS"
    done = shell("local.sh", "2", "bash", "-c", line, PORT="1234")
    assert done.returncode == 0
    assert sorted(done.stdout.split()) == [f"{i}/2//localhost:1234" for i in (0, 1)]
    done = shell("local.sh", "2", "bash", "-c", line, PORT="1234", GPU_EACH="1")
    assert sorted(done.stdout.split()) == [f"{i}/2/{i}/localhost:1234" for i in (0, 1)]


def test_local_ends_all_when_one_fails():
    line = "if [ $JAX_PROCESS_ID = 1 ]; then exit 7; fi; exec sleep 100"
    begin = time.monotonic()
    done = shell("local.sh", "3", "bash", "-c", line, GRACE="0")
    assert done.returncode == 7 and time.monotonic() - begin < 50


SAVES = """
import os, runpy, sys, time
StopSignal = runpy.run_path("jaxkd/training/signals.py")["StopSignal"]
with StopSignal() as stop:
    os.write(1, b"ready\\n")
    while stop.received is None:
        time.sleep(0.02)
    time.sleep(0.3)
    os.write(1, b"saved\\n")
    sys.exit(75)
"""


def started_locally(*command):
    """Two processes that are ready, in a session of their own as in a terminal."""
    process = start({**os.environ, "GRACE": "60"}, *command, processes=2)
    ready = [process.stdout.readline() for _ in range(2)]
    if ready != ["ready\n"] * 2:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"{ready}, {process.communicate()}")
    return process


def test_ctrl_c_lets_the_processes_save():
    process = started_locally(sys.executable, "-c", SAVES)
    # A terminal sends it to the script and to all that it has started.
    os.killpg(process.pid, signal.SIGINT)
    out, err = finish(process, 75)
    assert out == "saved\n" * 2 and "Ctrl-C again ends them at once" in err


def test_a_second_ctrl_c_ends_processes_that_do_not(tmp_path):
    line = (
        f"trap '' TERM; echo $$ >> {tmp_path}/pids; echo ready; while :; do sleep 0.1"
    )
    process = started_locally("bash", "-c", line + "; done")
    os.killpg(process.pid, signal.SIGINT)
    assert "Ctrl-C again" in process.stderr.readline()
    time.sleep(0.3)
    assert process.poll() is None
    deadline = time.monotonic() + 30
    # Again, should it come while the script still answers the first one.
    while process.poll() is None and time.monotonic() < deadline:
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.2)
    finish(process, 130)
    for pid in (tmp_path / "pids").read_text().split():
        with pytest.raises(ProcessLookupError):
            for _ in range(100):
                os.kill(int(pid), 0)
                time.sleep(0.05)


@pytest.fixture
def fake(tmp_path):
    """Puts commands into a PATH that note how they are called."""
    log = tmp_path / "log"

    def make(*names, status=0):
        for name in names:
            path = tmp_path / "bin" / name
            path.parent.mkdir(exist_ok=True)
            text = f'#!/bin/sh\necho {name} "$@" >> {log}\nexit {status}\n'
            path.write_text(text)
            path.chmod(0o755)
        return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def read():
        return log.read_text().splitlines() if log.exists() else []

    make.read = read
    return make


def test_slurm_starts_the_command_in_every_task(fake):
    path = fake("srun", "scontrol")
    done = shell("slurm.sh", "--config=c.py", "--workdir=a b", **path, PYTHON="py")
    assert done.returncode == 0, done.stderr
    (call,) = fake.read()
    assert call.startswith("srun --kill-on-bad-exit=0 --gpu-bind=none py -m jaxkd.main")
    assert call.endswith("--distributed=auto --config=c.py --workdir=a b")


def test_slurm_gives_the_cores_of_a_task_to_srun(fake):
    path = fake("srun", "scontrol")
    done = shell("slurm.sh", **path, PYTHON="py", SLURM_CPUS_PER_TASK="8")
    assert done.returncode == 0, done.stderr
    (call,) = fake.read()
    assert " --cpus-per-task=8 py -m jaxkd.main" in call


@pytest.mark.parametrize(("status", "again"), [(75, True), (1, False), (2, False)])
def test_slurm_queues_a_stopped_run_again(fake, status, again):
    fake("scontrol")
    path = fake("srun", status=status)
    done = shell("slurm.sh", "--config=c.py", **path, SLURM_JOB_ID="42")
    assert done.returncode == status
    assert ("scontrol requeue 42" in fake.read()) == again


def test_slurm_options_stand_before_the_first_command():
    text = (LAUNCH / "slurm.sh").read_text()
    before, _, after = text.partition("set -euo pipefail")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", before, re.M))
    assert "#SBATCH" not in after
    # JAX picks a task's GPU by its number on the node: it must see all of them.
    assert options["gpu-bind"] == "none" and "gpus-per-task" not in options
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "TERM@120"


def test_tpu_pod_runs_on_every_host_and_keeps_arguments_whole(fake):
    path = fake("gcloud")
    run = ("pod", "zone", "run", "--config=c.py", "--workdir=a b")
    done = shell("tpu_pod.sh", *run, **path)
    assert done.returncode == 0, done.stderr
    (call,) = fake.read()
    assert call.startswith(
        "gcloud compute tpus tpu-vm ssh pod --zone=zone --worker=all --command="
    )
    assert r"--distributed=auto --config=c.py --workdir=a\ b" in call
    assert shell("tpu_pod.sh", "pod", "zone", "stop", **path).returncode == 0
    assert "pkill -TERM -f '[p]ython -m jaxkd.main'" in fake.read()[1]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_tpu_pod_copies_the_checkout(fake):
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    path = fake("gcloud")
    done = shell("tpu_pod.sh", "pod", "zone", "setup", **path)
    assert done.returncode == 0, done.stderr
    copy, *install = fake.read()
    assert "tpu-vm scp" in copy and copy.endswith("--zone=zone --worker=all")
    assert "/jaxkd.tar.gz pod: " in copy and "jax[tpu]" in "\n".join(install)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_tpu_pod_tells_of_what_it_does_not_copy(fake, tmp_path):
    root = tmp_path / "checkout"
    (root / "launch").mkdir(parents=True)
    shutil.copy(LAUNCH / "tpu_pod.sh", root / "launch")
    path = {**fake("gcloud"), "HOME": str(tmp_path)}
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init"], ["add", "."], [*author, "commit", "-m", "all"]):
        git = ["git", "-C", str(root), *arguments]
        subprocess.run(git, check=True, capture_output=True, env=path)

    def setup():
        command = ["bash", str(root / "launch" / "tpu_pod.sh"), "pod", "zone", "setup"]
        done = subprocess.run(command, env=path, capture_output=True, text=True)
        assert done.returncode == 0
        return done.stderr

    assert setup() == ""
    (root / "new.py").write_text("x = 1\n")
    assert "without your uncommitted changes:\n?? new.py\n" in setup()


@pytest.mark.parametrize("arguments", [(), ("pod", "zone"), ("pod", "zone", "dance")])
def test_tpu_pod_says_how_it_is_used(arguments):
    done = shell("tpu_pod.sh", *arguments)
    assert done.returncode == 2 and "run" in done.stderr


# -------------------------------------------------------------------- the manifest

# The fields of JobSet (jobset.x-k8s.io/v1alpha2) and of the Job and Pod inside that the
# manifest uses. A type, a set of allowed values, a list of one item, or the fields of a
# group, of which those with "?" may be missing.
CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "args": [str],
    "env": [
        {
            "name": str,
            "value?": str,
            "valueFrom?": {"fieldRef": {"fieldPath": str}},
        }
    ],
    "ports": [{"containerPort": int}],
    "resources": {"limits": {"nvidia.com/gpu": int}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {
    "restartPolicy": {"Never"},
    "terminationGracePeriodSeconds": int,
    "containers": [CONTAINER],
    "volumes": [
        {
            "name": str,
            "emptyDir?": {"medium": {"Memory"}},
            "persistentVolumeClaim?": {"claimName": str},
        }
    ],
}
EXIT_CODES = {"containerName": str, "operator": {"In", "NotIn"}, "values": [int]}
JOB = {
    "completionMode": {"Indexed"},
    "parallelism": int,
    "completions": int,
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [{"action": {"FailJob", "Ignore", "Count"}, "onExitCodes": EXIT_CODES}]
    },
    "template": {"spec": POD},
}
JOBSET = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": {"name": str},
    "spec": {
        "network": {"enableDNSHostnames": bool},
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [
                {
                    "name": str,
                    "action": {"FailJobSet", "RestartJobSet"},
                    "onJobFailureReasons": [str],
                }
            ],
        },
        "replicatedJobs": [
            {"name": str, "replicas": int, "template": {"spec": JOB}},
        ],
    },
}


def mistakes(value, schema, path="manifest"):
    """What does not fit a schema as above, one line each."""
    if isinstance(schema, type):
        fits = type(value) is schema
        return [] if fits else [f"{path}: {value!r} is no {schema.__name__}"]
    if isinstance(schema, set):
        return [] if value in schema else [f"{path}: {value!r} is not in {schema}"]
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{path}: {value!r} is no list with items"]
        parts = [mistakes(v, schema[0], f"{path}[{i}]") for i, v in enumerate(value)]
        return sum(parts, [])
    if not isinstance(value, dict):
        return [f"{path}: {value!r} has no fields"]
    fields = {name.removesuffix("?"): inner for name, inner in schema.items()}
    found = [f"{path}.{name}: unknown" for name in value.keys() - fields.keys()]
    for name in fields.keys() - value.keys():
        if f"{name}?" not in schema:
            found.append(f"{path}.{name}: missing")
    for name in value.keys() & fields.keys():
        found += mistakes(value[name], fields[name], f"{path}.{name}")
    return found


@pytest.fixture
def manifest():
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def test_the_manifest_has_the_fields_of_a_jobset(manifest):
    assert mistakes(manifest, JOBSET) == []


def test_mistakes_in_a_manifest_would_be_found(manifest):
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["parallelism"] = "2"
    job["completion"] = job.pop("completions")
    job["template"]["spec"]["restartPolicy"] = "Always"
    assert len(mistakes(manifest, JOBSET)) == 4


def test_every_node_finds_the_first_one(manifest):
    name = manifest["metadata"]["name"]
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    variables = {v["name"]: v.get("value") for v in container["env"]}
    host, port = variables["JAX_COORDINATOR_ADDRESS"].split(":")
    # JobSet's names: <jobset>-<job>-<number of the job>-<number of the pod>.<jobset>
    assert host == f"{name}-{replicated['name']}-0-0.{name}"
    assert [{"containerPort": int(port)}] == container["ports"]
    assert job["parallelism"] == job["completions"]
    assert variables["JAX_NUM_PROCESSES"] == str(job["completions"])
    (index,) = [v for v in container["env"] if v["name"] == "JAX_PROCESS_ID"]
    path = index["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    volumes = {v["name"] for v in job["template"]["spec"]["volumes"]}
    assert {m["name"] for m in container["volumeMounts"]} == volumes


def test_a_mistake_in_the_config_is_not_tried_again(manifest):
    (rule,) = manifest["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    (inner,) = job["podFailurePolicy"]["rules"]
    assert inner["onExitCodes"]["values"] == [2]
    (container,) = job["template"]["spec"]["containers"]
    assert inner["onExitCodes"]["containerName"] == container["name"]
