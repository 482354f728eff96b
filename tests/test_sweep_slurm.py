"""rcka.experiments.sweep on a real Slurm of one node, started here and stopped at the end.

Skipped where it cannot start (needs slurm-wlm, munge and root)."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from rcka.experiments.experiment import Experiment
from rcka.experiments.sweep import grid, slurm, sweep

sys.path.insert(0, str(Path(__file__).parent))
from sweep_stub import write_stub

pytestmark = pytest.mark.slow

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.log
SlurmctldPort={port}
SlurmdPort={other}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MpiDefault=none
KillWait=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 Gres=gpu:1 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE State=UP
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF State=UP
"""


def free_ports(n):
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


@pytest.fixture(scope="module")
def cluster():
    "A node with two cores and one (pretended) GPU; jobs of partition `high` preempt those of `low`."
    absent = [
        tool
        for tool in ("munged", "slurmctld", "slurmd", "sbatch")
        if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin")
    ]
    if absent:
        pytest.skip(f"no Slurm here: {', '.join(absent)} not found (Debian: apt-get install slurm-wlm munge)")
    if os.geteuid():
        pytest.skip("Slurm's daemons are started as root only")
    pytest.importorskip("submitit", reason="pip install 'rcka[slurm]'")
    home, host = Path(tempfile.mkdtemp(prefix="slurm-")), socket.gethostname().split(".")[0]
    home.chmod(0o755)
    for name in ("munge", "state", "spool"):
        (home / name).mkdir(mode=0o755)
    port, other = free_ports(2)
    (home / "slurm.conf").write_text(CONF.format(home=home, host=host, port=port, other=other))
    (home / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    (home / "key").write_bytes(os.urandom(1024))
    (home / "key").chmod(0o400)
    env = {**os.environ, "SLURM_CONF": str(home / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    munge = {name: f"{home}/munge/{name}" for name in ("socket", "pid-file", "log-file", "seed-file")}
    daemons = [
        ["munged", "--foreground", "--force", f"--key-file={home}/key", *(f"--{k}={v}" for k, v in munge.items())],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    ]
    running = []
    try:
        for command in daemons:
            running.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            time.sleep(0.5)
        for _ in range(40):
            if " idle " in subprocess.run(["sinfo", "-h"], env=env, capture_output=True, text=True).stdout:
                break
            time.sleep(0.5)
        else:
            pytest.skip(
                "Slurm did not start here: "
                f"{(home / 'slurmctld.log').read_text()[-500:] if (home / 'slurmctld.log').exists() else 'no log'}"
            )
        with pytest.MonkeyPatch.context() as patch:
            for name in ("SLURM_CONF", "PATH"):
                patch.setenv(name, env[name])
            yield home
            subprocess.run(["scancel", "--full", "-u", "root"], capture_output=True)
            time.sleep(0.5)
    finally:
        for daemon in reversed(running):
            daemon.terminate()
        for daemon in reversed(running):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_FIELDS", json.dumps(list(Experiment().to_dict())))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    return write_stub(tmp_path / "stub.ipynb")


def jobs():
    return subprocess.run(["squeue", "-h", "-o", "%i %T %b %C"], capture_output=True, text=True).stdout.split("\n")[:-1]


def test_slurm(cluster, stub, tmp_path, monkeypatch):
    """Two runs share a job and its GPU; the job is preempted, then reaches its time limit, and each time its runs go on
    from their last epochs."""
    monkeypatch.setenv("STUB_SECONDS", "0.5")
    root, seen = tmp_path / "runs", []
    runs = grid("digits", "resnet14:resnet8", "none", [0, 1], epochs=12)
    count = lambda name: min(len(p.read_text().split()) if (p := root / e.key / name).exists() else 0 for e in runs)

    def watch(tally):
        if count("starts") == len(seen) + 1 and count("epochs") >= 3 * count("starts"):
            seen.extend(jobs())
            if len(seen) == 1:
                subprocess.run(["srun", "-Q", "-p", "high", "-n", "2", "hostname"], check=True, capture_output=True)
            if len(seen) == 2:
                subprocess.run(
                    ["scancel", "--signal=USR2", seen[1].split()[0]], check=True
                )  # what Slurm sends before the limit

    out = sweep(
        runs,
        root,
        slurm(root, "low", gpus_per_run=1, runs_per_gpu=2, hours=0.2),
        stub,
        runs_per_job=2,
        watch=watch,
        every=0.5,
    )
    assert len(set(seen[:2])) == 1 and "RUNNING" in seen[0] and "gpu:1" in seen[0] and seen[0].endswith(" 2"), (
        seen
    )  # one job, one GPU, two cores
    assert Counter(o.state for o in out) == {"done": 2}, out
    for e in runs:
        assert len((root / e.key / "starts").read_text().split()) == 3
        assert (root / e.key / "epochs").read_text().split() == [
            str(n) for n in range(1, 13)
        ]  # none twice, none left out
