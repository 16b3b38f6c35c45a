"""A real SLURM for the tests: one controller and two nodes, each in Linux namespaces of its own.

    this machine     munged, behind a UNIX socket in the cluster's directory
    host `ctl`       slurmctld, and a network bridge 10.77.0.1
    hosts `n1` `n2`  slurmd, each at one end of a cable (veth pair) whose other end is in the bridge

A host is a process `unshare` with its own network, PIDs, host name and /etc/hosts. So names resolve as on a cluster,
nothing listens on this machine's network, and SIGKILL to that one process is a crash of the node: the kernel ends
whatever lives in its PID namespace. Pulling the cable is a partition. Everything is stopped by the PID it was started
with; a cluster whose test process died is ended by the kernel (PR_SET_PDEATHSIG).

Needs root and Debian's packages slurmctld, slurmd, slurm-client, munge, iproute2; without them the tests are skipped
with the reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "nsenter", "setpriv", "ip")
NODES = {"n1": "10.77.0.11", "n2": "10.77.0.12"}
CONTROLLER = {"ctl": "10.77.0.1"}
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}

# config_overrides: nodes may have more CPUs than the machine. cred_expire: a requeued job waits so long (120 by
# default). KillWait: SIGTERM to SIGKILL. RequeueExit is left out on purpose: most sites do not have it.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=ctl(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire={cred_expire}
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=200000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=8
SlurmctldTimeout=10
SlurmdTimeout=5
MessageTimeout=10
TCPTimeout=2
NodeName=n1 NodeAddr=10.77.0.11 Port=6818 CPUs=4 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeAddr=10.77.0.12 Port=6818 CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""

BECOME_HOST = """\
hostname "$1"; mount --bind "$2" /etc/hosts; ip link set lo up
if [ "$1" = ctl ]; then
    ip link add br0 type bridge; ip addr add "$3/24" dev br0; ip link set br0 up
else
    until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
    ip addr add "$3/24" dev eth0; ip link set eth0 up
fi
shift 3
exec "$@"
"""


def why_not_here() -> str | None:
    """Why this machine cannot run the cluster; None when it can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)} here (apt-get install slurmctld slurmd slurm-client munge iproute2)"
    if os.geteuid():
        return "a SLURM cluster in namespaces needs root"
    probe = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"], check=False)
    return "no right to create namespaces" if probe.returncode else None


class Cluster:
    """The running cluster: submit, ask, wait, and break a node."""

    def __init__(self, root: Path, cred_expire: int) -> None:
        self.root = root
        self._processes: dict[str, subprocess.Popen] = {}
        hosts = {"localhost": "127.0.0.1", **CONTROLLER, **NODES}
        for folder in ("state", "spool.n1", "spool.n2"):
            (root / folder).mkdir()
        (root / "slurm.conf").write_text(CONFIGURATION.format(root=root, cred_expire=cred_expire))
        (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (root / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        (root / "munge.key").write_bytes(os.urandom(128))
        (root / "munge.key").chmod(0o600)

    def start(self) -> None:
        """Munge, controller and nodes; returns when both nodes are idle."""
        at = self.root
        self._spawn(
            "munged",
            ["munged", "--foreground", "--force", f"--key-file={at}/munge.key", f"--socket={at}/munge.sock"]
            + [f"--{kind}-file={at}/munged.{kind}" for kind in ("pid", "log", "seed")],
        )
        self._until((at / "munge.sock").exists, "munged")
        self._boot("ctl", CONTROLLER["ctl"], ["slurmctld", "-D", "-c", "-f", f"{at}/slurm.conf"])
        self._until(lambda: "br0" in self._ip("-br", "link", "show", "up"), "the bridge")
        for node in NODES:
            self.boot_node(node)
        self._until(lambda: self.node_states() == dict.fromkeys(NODES, "idle"), "idle nodes")

    def stop(self) -> None:
        """End every process that was started."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait(20)

    def run(self, *argv: str | Path, env: dict[str, str] | None = None, check: bool = True) -> str:
        """What a command prints, run as a user on the login node would."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "KHA_"))}
        done = subprocess.run(
            ["nsenter", "-t", self._inner("ctl"), "--net", "--uts", "--mount", f"--wd={ROOT}", *map(str, argv)],
            env={**kept, "SLURM_CONF": f"{self.root}/slurm.conf", **(env or {})},
            check=False,
            text=True,
            capture_output=True,
            timeout=300,
        )
        assert not check or done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """`scontrol show job` as a dict."""
        words = self.run("scontrol", "-o", "show", "job", job_id).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, job_id: str, timeout: float = 300) -> dict[str, str]:
        """The job, once it has ended for good."""
        self._until(lambda: self.job(job_id)["JobState"] in ENDED, f"the end of job {job_id}", timeout)
        return self.job(job_id)

    def node_states(self) -> dict[str, str]:
        """State of every node: idle, alloc, down*, ..."""
        return dict(line.split() for line in self.run("sinfo", "-hN", "-p", "main", "-o", "%N %t").splitlines())

    def crash_node(self, node: str) -> None:
        """Power off: nothing that ran there runs on."""
        self._processes[node].kill()
        self._processes.pop(node).wait(20)
        self._ip("link", "del", f"v{node}")

    def boot_node(self, node: str) -> None:
        """Start a node and plug its cable in."""
        self._boot(node, NODES[node], ["slurmd", "-D", "-N", node, "-f", f"{self.root}/slurm.conf"])
        self._ip("link", "add", f"v{node}", "type", "veth", "peer", "name", "eth0", "netns", self._inner(node))
        self._ip("link", "set", f"v{node}", "master", "br0", "up")

    def set_cable(self, node: str, plugged: bool) -> None:
        """A network partition of one node, or its end."""
        self._ip("link", "set", f"v{node}", "up" if plugged else "down")

    def logs(self) -> str:
        """The ends of the daemons' logs, for a test that failed."""
        paths = [*self.root.glob("*.log"), *self.root.glob("*.out")]
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in paths)

    def _spawn(self, name: str, argv: list[str]) -> None:
        with (self.root / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "SLURM_CONF": f"{self.root}/slurm.conf"},
                cwd=self.root,
            )

    def _boot(self, host: str, address: str, daemon: list[str]) -> None:
        namespaces = ["--net", "--mount", "--uts", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        enter = ["bash", "-ec", BECOME_HOST, "host", host, f"{self.root}/hosts", address]
        self._spawn(host, ["unshare", *namespaces, *enter, *daemon])
        self._until(lambda: bool(self._inner(host)), f"the namespaces of {host}")

    def _inner(self, host: str) -> str:
        """The PID, seen from here, of the first process inside a host."""
        pid = self._processes[host].pid
        return (Path(f"/proc/{pid}/task/{pid}/children").read_text().split() or [""])[0]

    def _ip(self, *argv: str) -> str:
        inside = ["nsenter", "-t", self._inner("ctl"), "--net", "ip", *argv]
        return subprocess.run(inside, check=False, text=True, capture_output=True, timeout=10).stdout

    def _until(self, ready: Callable[[], bool], what: str, timeout: float = 30) -> None:
        deadline = time.monotonic() + timeout
        while not self._holds(ready):
            assert time.monotonic() < deadline, f"waited {timeout} s for {what}\n{self.logs()}"
            time.sleep(0.1)

    @staticmethod
    def _holds(ready: Callable[[], bool]) -> bool:
        try:
            return ready()
        except (AssertionError, OSError):
            return False


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One cluster for all tests of this folder."""
    reason = why_not_here()
    if reason:
        pytest.skip(reason)
    # A UNIX socket's path has 107 characters at most, so pytest's own long directories will not do.
    root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    root.chmod(0o755)
    made = Cluster(root, cred_expire=6)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def job_environment(clean_environment: dict[str, str]) -> dict[str, str]:
    """What a user of the checkout would have set before sbatch: the interpreter, two ranks a job, one a node."""
    kept = {key: value for key, value in clean_environment.items() if not key.startswith(("SLURM", "SBATCH"))}
    return {
        **kept,
        "KHA_PYTHON": sys.executable,
        "KHA_LAUNCH": f"{ROOT}/launch",
        "KHA_NPROC": "1",
        "PYTHONPATH": ROOT.as_posix(),
    }
