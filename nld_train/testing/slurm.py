"""A real Slurm cluster on this machine: a controller and nodes that lose power when they are killed.

Each node is a slurmd in network, process and mount namespaces of its own, so that its name is its own, its localhost
is not another node's, and its end is that of everything it runs. All of them live in the namespaces of one process and
end with it, and that one ends with the process that has started the cluster: nothing stays behind, whatever happens.
Partition "main" has all nodes; a job in "urgent", the first node alone, preempts those of "main". GPUs are pretended,
8 a node. Needs root, Debian's slurmctld, slurmd, slurm-client and munge, and iproute2.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter", "setpriv")
NETWORK = "10.31.0"  # seen by the cluster alone
CPUS, MEMORY_MB, GPUS = 64, 512_000, 8  # of a node; pretended
# The shell that runs the commands which follow ends with unshare, and all that lives in its namespaces with it.
UNSHARE = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=KILL", "bash", "-c")
FREEZER = Path("/sys/fs/cgroup/freezer")


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install slurmctld slurmd slurm-client munge iproute2)"
    if os.geteuid() != 0:
        return "a Slurm cluster is started by root"
    probe = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "ip", "link", "set", "lo", "up"]
    refused = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"namespaces are not allowed here: {refused.stderr.strip()}" if refused.returncode else None


class Cluster:
    """``num_nodes`` nodes in the folder ``directory``; up and idle when the constructor returns.

    Raises:
        RuntimeError: it does not come up; says what its logs say.
    """

    def __init__(self, directory: Path, num_nodes: int) -> None:
        self.directory = directory
        self.names = [f"n{os.getpid()}-{i}" for i in range(1, num_nodes + 1)]  # cgroups have them: one per cluster
        self.environment = os.environ | {"SLURM_CONF": str(directory / "slurm.conf")}
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._write_configuration()
        # The shell waits for its children, so that a daemon that fails is seen in the logs and the rest stays.
        self._root = self._start(
            "controller",
            ["setpriv", "--pdeathsig=KILL", *UNSHARE, self._controller_commands()],
        )
        try:
            # A node is started in the namespaces of the controller, which are there when its bridge is.
            self._until(lambda: self._inside("ip", "addr", "show", "switch").returncode == 0, "the controller")
            for number in range(1, num_nodes + 1):
                self.start_node(number)
            self._until(
                lambda: self.slurm("sinfo", "-hN", "-p", "main", "-t", "idle", "-o", "%N").count("\n") == num_nodes,
                "the nodes",
            )
        except BaseException:
            self.stop()
            raise

    def _write_configuration(self) -> None:
        home = self.directory
        for name in ("munge", "state", "spool", "log", "dev"):
            (home / name).mkdir(parents=True)
        home.chmod(0o755)
        (home / "munge/key").write_bytes(os.urandom(128))
        (home / "munge/key").chmod(0o600)
        for number in range(GPUS):  # a GPU is a device file: copies of /dev/null
            os.mknod(home / f"dev/gpu{number}", 0o20666, os.makedev(1, 3))
        # As on real clusters, where it is allowed: a signal to a task reaches no other process.
        tracking = "cgroup" if os.access(FREEZER / "cgroup.procs", os.W_OK) else "linuxproc"
        nodes = [
            f"NodeName={name} NodeAddr={NETWORK}.{10 + i} CPUs={CPUS} Boards=1 SocketsPerBoard=1 CoresPerSocket={CPUS} "
            f"ThreadsPerCore=1 RealMemory={MEMORY_MB} Gres=gpu:{GPUS} State=UNKNOWN"
            for i, name in enumerate(self.names, 1)
        ]
        (home / "slurm.conf").write_text(
            f"""ClusterName=test
SlurmctldHost=controller({NETWORK}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={home}/munge/socket,cred_expire=5
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/spool/%n.pid
SlurmctldLogFile={home}/log/slurmctld.log
SlurmdLogFile={home}/log/%n.log
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
JobRequeue=1
KillWait=5
SlurmdTimeout=10
ReturnToService=2
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""
            + "\n".join(nodes)
            + "\nPartitionName=main Nodes=ALL Default=YES MaxTime=2:00:00 PriorityTier=1 GraceTime=60 State=UP\n"
            + f"PartitionName=urgent Nodes={self.names[0]} MaxTime=INFINITE PriorityTier=9 State=UP\n"
        )
        names = ",".join(self.names)
        (home / "gres.conf").write_text(f"NodeName={names} Name=gpu File={home}/dev/gpu[0-{GPUS - 1}]\n")
        (home / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        hosts = [f"{NETWORK}.{10 + i} {name}\n" for i, name in enumerate(self.names, 1)]
        (home / "hosts").write_text(Path("/etc/hosts").read_text() + f"{NETWORK}.1 controller\n" + "".join(hosts))

    def _controller_commands(self) -> str:
        home = shlex.quote(str(self.directory))
        return f"""
            set -e
            hostname controller
            mount --bind {home}/hosts /etc/hosts
            ip link set lo up
            ip link add switch up type bridge
            munged -F --key-file={home}/munge/key --socket={home}/munge/socket --seed-file={home}/munge/seed \\
                --pid-file={home}/munge/pid --log-file={home}/log/munged.log --force &
            until [ -e {home}/munge/socket ]; do sleep 0.02; done
            ip addr add {NETWORK}.1/24 dev switch
            slurmctld -D &
            wait
        """

    def start_node(self, number: int) -> None:
        """Boot node ``number``, counted from 1."""
        name, home = self.names[number - 1], shlex.quote(str(self.directory))
        commands = f"""
            set -e
            hostname {name}
            mount --bind {home}/hosts /etc/hosts
            ip link set lo up
            until ip link set eth0 up 2> /dev/null; do sleep 0.02; done
            ip addr add {NETWORK}.{10 + number}/24 dev eth0
            slurmd -D -N {name} &
            wait
        """
        node = self._start(f"{name}.out", [*self._enter(), *UNSHARE, commands])
        self._nodes[number] = node
        # The cable: its other end goes into the network of the node's shell, which is there a moment later.
        self._until(lambda: self._plug(node, f"port{number}"), f"the network of {name}")

    def _plug(self, node: "subprocess.Popen[bytes]", port: str) -> bool:
        inner = _first_child(node.pid)
        if inner is None or os.readlink(f"/proc/{inner}/ns/net") == os.readlink(f"/proc/{self._pid}/ns/net"):
            return False
        # From outside: ip takes the network by its process number as it is here.
        cable = f"ip link add {port} type veth peer name eth0 netns {inner} && ip link set {port} netns {self._pid}"
        if subprocess.run(["bash", "-c", cable], capture_output=True, check=False).returncode:
            return False
        return self._inside("ip", "link", "set", port, "up", "master", "switch").returncode == 0

    def kill_node(self, number: int) -> None:
        """Node ``number`` loses its power: all of its processes die at once."""
        node = self._nodes.pop(number)
        inner = _first_child(node.pid)
        assert inner is not None
        os.kill(inner, signal.SIGKILL)
        node.wait()

    def run(self, command: Sequence[str], *, timeout: float = 60, **options: str) -> subprocess.CompletedProcess[str]:
        """Run a command where the cluster is reached. ``options``: environment variables."""
        return subprocess.run(
            [*self._enter("--net"), *command],
            env=self.environment | options, capture_output=True, text=True, check=False, timeout=timeout,
        )  # fmt: skip

    def slurm(self, *command: str) -> str:
        """What one of Slurm's commands prints; nothing where it fails."""
        return self.run(command).stdout

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says (JobState, Restarts, NodeList, Reason, ...)."""
        return dict(re.findall(r"(\w+)=(\S*)", self.slurm("scontrol", "-o", "show", "job", number)))

    def wait(
        self, job: str, until: Callable[[dict[str, str]], bool] | None = None, *, timeout: float
    ) -> dict[str, str]:
        """Wait until the job is over, or ``until`` is true of it.

        Raises:
            RuntimeError: not in time, or it is over before.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = self.job(job)
            over = not re.match(
                r"PENDING|RUNNING|SIGNALING|COMPLETING|CONFIGURING|REQUEUED|SUSPENDED", found.get("JobState", "")
            )
            if until(found) if until is not None else over:
                return found
            if over:
                raise RuntimeError(f"job {job} is over: {found}")
            time.sleep(0.2)
        raise RuntimeError(f"job {job} has not come so far in {timeout} s: {self.job(job)}")

    def stop(self) -> None:
        """Power off; everything is gone when this returns."""
        for node in self._nodes.values():
            if (inner := _first_child(node.pid)) is not None:
                os.kill(inner, signal.SIGKILL)
        self._root.kill()
        for process in (self._root, *self._nodes.values()):
            process.wait()
        for name in self.names:
            for folder, _, _ in os.walk(FREEZER / f"slurm_{name}", topdown=False):
                try:
                    os.rmdir(folder)
                except OSError:  # a process of it is still on its way out; an empty cgroup costs nothing
                    break

    @property
    def _pid(self) -> int:
        inner = _first_child(self._root.pid)
        if inner is None:
            raise RuntimeError(f"the cluster is gone: {self._log('controller')}")
        return inner

    def _start(self, name: str, command: Sequence[str]) -> "subprocess.Popen[bytes]":
        with (self.directory / "log" / name).open("ab") as output:
            return subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    def _enter(self, *namespaces: str) -> list[str]:
        return ["nsenter", f"--target={self._pid}", *(namespaces or ("--net", "--uts", "--mount", "--pid"))]

    def _inside(self, *command: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([*self._enter("--net"), *command], capture_output=True, check=False)

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if condition():
                    return
            except (RuntimeError, FileNotFoundError):
                pass
            time.sleep(0.05)
        raise RuntimeError(f"{what} did not come up: {self._log('controller')} {self._log('slurmctld.log')}")

    def _log(self, name: str) -> str:
        path = self.directory / "log" / name
        return path.read_text(errors="replace")[-2000:] if path.exists() else ""


def _first_child(pid: int) -> int | None:
    """The process that ``unshare --fork`` has started, from which the namespaces are entered."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return None
    return int(children[0]) if children else None
