"""slurm/train.sbatch: how a job ends, for every way in which a run can end.

The script is the one that is submitted; srun, scontrol and scancel are shell functions that stand for a run with a
given end. tests/slurm/test_runs.py lets real runs end on a real cluster.
"""

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from slurm.submit import MAX_IDLE_STARTS, Job, render

JOB = "4242"

# What the step does: it writes the heartbeat and the checkpoint that it is told to, waits for a signal where it is told
# to, and exits with the status that it is told to.
STANDINS = """
srun() {{
    printf '%s\\n' "$@" > "{here}/srun"
    {leaves}
    {waits}
    exit {status}
}}
sed() {{ {concluding}; command sed "$@"; }}
scontrol() {{
    if [[ $1 == show ]]; then {early}; echo first-node; echo second-node
    elif [[ $2 == show ]]; then echo "JobId=$4 JobState=RUNNING Reason={reason} Dependency=(null)"
    else echo "$*" >> "{here}/calls"; {requeueing}; return {requeue_status}; fi
}}
scancel() {{ echo "scancel $*" >> "{here}/calls"; }}
"""
WAITS = """trap 'asked=1' USR2; asked=
    touch "{here}/waits"; for _ in $(seq 1000); do kill -0 $$ || exit
    [[ $asked && -e "{here}/go" ]] && break; sleep 0.02; done
    [[ $asked ]] || {{ touch "{here}/unasked"; exit 99; }}"""


@dataclass
class Ended:
    status: int
    calls: list[str]
    output: str


@dataclass
class FakeRun:
    """A run's folder, and starts of its job."""

    folder: Path
    jobs: tuple[str, ...] = (JOB,)
    starts: int = field(default=0)

    @property
    def run_dir(self) -> Path:
        return self.folder / "my run"

    @property
    def submission(self) -> Path:
        return self.run_dir / "slurm/001"

    def heartbeat(self, state: str, job: str | int | None = JOB, **more: object) -> str:
        return json.dumps({"state": state, "step": 7, "time": time.time(), "slurm_job_id": job, **more})

    def checkpoint(self, step: int) -> None:
        (self.run_dir / f"checkpoints/step_{step:08d}").mkdir(parents=True)

    def start(
        self,
        *,
        state: str | None = None,
        job: str | int | None = JOB,
        status: int = 1,
        checkpoint: int | None = None,
        signals: tuple[signal.Signals, ...] = (),
        reason: str = "None",
        requeue_status: int = 0,
        early: str = "",
        concluding: str = "",
        requeueing: str = "",
    ) -> Ended:
        """One start of the job, to its end.

        Args:
            state: what the run says in its heartbeat, None for nothing.
            signals: sent to the script while the step runs.
            early: names of signals that come before there is a step; the step then waits for its own.
            concluding: those that come when the step has ended, before it is decided how the run goes on.
            requeueing: those that come while the job is put back into the queue.
        """
        self.submission.mkdir(parents=True, exist_ok=True)
        (self.submission / "jobs").write_text("".join(f"{number}\n" for number in self.jobs))
        leaves = []
        if state is not None:
            (self.folder / "next").write_text(self.heartbeat(state, job))
            leaves.append(f'cp "{self.folder}/next" "{self.run_dir}/heartbeat.json"')
        if checkpoint is not None:
            leaves.append(f'mkdir -p "{self.run_dir}/checkpoints/step_{checkpoint:08d}"')
        standins = STANDINS.format(
            here=self.folder, status=status, reason=reason, requeue_status=requeue_status,
            leaves="; ".join(leaves) or ":",
            waits=WAITS.format(here=self.folder) if signals or early else ":",
            **{
                moment: " ; ".join(f"kill -{name} $$" for name in names.split()) or ":"
                for moment, names in (("early", early), ("concluding", concluding), ("requeueing", requeueing))
            },
        )  # fmt: skip
        script = render(Job(nodes=2, gpus_per_node=2, setup="source standins"), self.submission, self.run_dir)
        script = script.replace("source standins", standins)
        assert "standins" not in script
        for name in ("calls", "waits", "go"):
            (self.folder / name).unlink(missing_ok=True)
        variables = {"SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
        variables |= {"SLURM_RESTART_COUNT": str(self.starts)}
        output = self.folder / "output"
        # A shell that starts tests in the background has them ignore SIGINT, and what ignores it bash cannot trap.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        with output.open("w") as file:  # no pipe: a srun that is left behind would hold it open
            process = subprocess.Popen(["bash", "-c", script], env=os.environ | variables, stdout=file, stderr=file)
        signal.signal(signal.SIGINT, before)
        self.starts += 1
        for number in signals:
            while not (self.folder / "waits").exists():
                assert process.poll() is None, output.read_text()
                time.sleep(0.01)
            process.send_signal(number)
            time.sleep(0.05)
        (self.folder / "go").touch()
        process.wait(30)
        calls = self.folder / "calls"
        return Ended(process.returncode, calls.read_text().splitlines() if calls.exists() else [], output.read_text())


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    return FakeRun(tmp_path)


REQUEUE = [f"requeue {JOB}"]


def test_a_finished_run_ends_the_job(run: FakeRun) -> None:
    ended = run.start(state="finished", status=0)
    assert (ended.status, ended.calls) == (0, []), ended.output


def test_a_finished_run_ends_the_rest_of_its_chain(run: FakeRun) -> None:
    run.jobs = ("4241", JOB, "4243", "4250")
    ended = run.start(state="finished", status=0)
    assert (ended.status, ended.calls) == (0, ["scancel 4243 4250"]), ended.output


@pytest.mark.parametrize(("state", "status"), [("failed", 1), (None, 78), ("starting", 78)])
def test_an_error_is_not_tried_again(run: FakeRun, state: str | None, status: int) -> None:
    ended = run.start(state=state, status=status, checkpoint=3)
    assert (ended.status, ended.calls) == (status, []), ended.output


def test_a_program_that_a_node_has_not_is_tried_again(run: FakeRun) -> None:
    assert run.start(state=None, status=2, checkpoint=3).calls == REQUEUE


def test_an_error_is_no_success_although_the_step_says_so(run: FakeRun) -> None:
    """srun's status is not the run's where the ranks of one node have ended well."""
    assert run.start(state="failed", status=143).status == 143


@pytest.mark.parametrize("job", [JOB, int(JOB)])
@pytest.mark.parametrize("state", ["stopped", "stalled", "lost", "running", "starting"])
def test_what_can_go_on_is_requeued(run: FakeRun, state: str, job: str | int) -> None:
    ended = run.start(state=state, job=job, checkpoint=5)
    assert (ended.status, ended.calls) == (75, REQUEUE), ended.output
    assert "from step 5" in ended.output


@pytest.mark.parametrize("state", ["stopped", "stalled", "running", None])
def test_starts_without_progress_end(run: FakeRun, state: str | None) -> None:
    """Three are tried again; a new checkpoint begins the count anew."""
    run.checkpoint(10)
    assert run.start(state=state).calls == REQUEUE
    assert run.start(state=state, checkpoint=12).calls == REQUEUE
    for _ in range(MAX_IDLE_STARTS):
        ended = run.start(state=state)
        assert (ended.status, ended.calls) == (75, REQUEUE), ended.output
    ended = run.start(state=state)
    assert (ended.status, ended.calls) == (1, []), ended.output
    assert "without a checkpoint after step 12" in ended.output


def test_the_state_of_an_earlier_start_or_of_another_job_is_not_this_ones(run: FakeRun) -> None:
    """A start that dies before its first heartbeat, or that finds the folder taken, says nothing."""
    run.submission.mkdir(parents=True)
    run.checkpoint(4)
    for state in ("failed", "finished"):
        (run.run_dir / "heartbeat.json").write_text(run.heartbeat(state))
        assert run.start(state=None).calls == REQUEUE
    for other in ("42", "14242", "42420", None):
        ended = run.start(state="failed", job=other, checkpoint=run.starts + 4)
        assert ended.calls == REQUEUE, ended.output


def test_a_warning_is_handed_to_the_run_and_requeued(run: FakeRun) -> None:
    ended = run.start(state="stopped", checkpoint=3, signals=(signal.SIGUSR1,))
    assert (ended.status, ended.calls) == (75, REQUEUE), ended.output
    assert "saving" in ended.output


def test_in_a_chain_the_next_job_goes_on(run: FakeRun) -> None:
    run.jobs = (JOB, "4243", "4244")
    ended = run.start(state="stopped", checkpoint=3, signals=(signal.SIGUSR1,))
    assert (ended.status, ended.calls) == (0, []), ended.output
    run.jobs = ("4241", JOB)
    ended = run.start(state="stopped", checkpoint=5, signals=(signal.SIGUSR1,))
    assert (ended.status, ended.calls) == (75, []), ended.output
    assert "last job of the chain" in ended.output


def test_in_a_chain_a_killed_run_is_requeued(run: FakeRun) -> None:
    run.jobs = (JOB, "4243")
    ended = run.start(state="running", checkpoint=3, status=137)
    assert (ended.status, ended.calls) == (75, REQUEUE), ended.output


@pytest.mark.parametrize("jobs", [(JOB,), (JOB, "4243")])
@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGUSR1, signal.SIGTERM), (signal.SIGINT,)])
def test_asked_to_end_it_ends(run: FakeRun, signals: tuple[signal.Signals, ...], jobs: tuple[str, ...]) -> None:
    """Not 0, so that nothing that waits for this job starts."""
    run.jobs = jobs
    ended = run.start(state="stopped", checkpoint=3, signals=signals)
    assert (ended.status, ended.calls) == (75, []), ended.output
    assert "submit the run again" in ended.output


@pytest.mark.parametrize("jobs", [(JOB,), (JOB, "4243"), ("4241", JOB)])
@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGUSR1, signal.SIGTERM)])
def test_over_its_time_it_is_requeued_at_once(
    run: FakeRun, signals: tuple[signal.Signals, ...], jobs: tuple[str, ...]
) -> None:
    """Also in a chain, and although it has saved: a job that was over its time has not ended well, for Slurm."""
    run.jobs = jobs
    run.checkpoint(2)
    ended = run.start(state="stopped", checkpoint=3, signals=signals, reason="TimeLimit")
    assert (ended.status, ended.calls) == (75, REQUEUE), ended.output


@pytest.mark.parametrize(
    ("early", "calls", "words"),
    [
        ("USR1", REQUEUE, "back into the queue"),
        ("TERM", [], "submit the run again to go on"),
        ("USR1 TERM", [], "submit"),
    ],
)
def test_who_asks_before_there_is_a_step_is_not_forgotten(
    run: FakeRun, early: str, calls: list[str], words: str
) -> None:
    """The step is asked as soon as it is there. (The one here may be so young that the signal ends it.)"""
    ended = run.start(state="stopped", checkpoint=3, early=early)
    assert (ended.status, ended.calls) == (75, calls), ended.output
    assert words in ended.output
    assert not (run.folder / "unasked").exists()


def test_asked_to_end_when_the_step_has_ended_it_ends(run: FakeRun) -> None:
    """The wish alone counts: nobody is left who could be asked to save, and a limit of time is no other matter."""
    for reason in ("None", "TimeLimit"):
        ended = run.start(state="stopped", checkpoint=run.starts + 3, concluding="TERM", reason=reason)
        assert (ended.status, ended.calls) == (75, []), ended.output
        assert "submit the run again" in ended.output
        assert "asked to end" not in ended.output
        assert "time is over" not in ended.output


def test_a_warning_when_the_step_has_ended_means_nothing(run: FakeRun) -> None:
    ended = run.start(state="stopped", checkpoint=3, concluding="USR1", requeueing="USR1")
    assert (ended.status, ended.calls) == (75, REQUEUE), ended.output
    assert "asked to make room" not in ended.output


@pytest.mark.parametrize("reason", ["None", "TimeLimit"])
def test_a_job_that_requeues_itself_gets_a_signal_and_does_it_once(run: FakeRun, reason: str) -> None:
    ended = run.start(state="stalled", checkpoint=3, requeueing="TERM", reason=reason)
    assert (ended.status, ended.calls) == (75, REQUEUE), ended.output
    assert ended.output.count("back into the queue") == 1
    assert "asked to end" not in ended.output


def test_where_requeueing_is_not_allowed_it_says_so(run: FakeRun) -> None:
    ended = run.start(state="stopped", checkpoint=3, requeue_status=1)
    assert ended.status == 75
    assert "cannot be put back" in ended.output


def test_the_step_runs_the_snapshot(run: FakeRun) -> None:
    run.start(state="finished", status=0)
    words = (run.folder / "srun").read_text().splitlines()
    code = run.submission / "code"
    assert words[-7:] == [
        f"{code}/slurm/launch.py", "torchrun", "2", f"{code}/train.py",
        "--config-path", str(run.submission), "--config-name", "config",
    ][-7:]  # fmt: skip
    assert "--kill-on-bad-exit=1" in words
    assert "--cpu-bind=none" in words
    start = (run.submission / "starts").read_text().split()
    assert start[2:] == [JOB, "0", "n[1-2]", "0"]
