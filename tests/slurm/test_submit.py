"""slurm/submit.py: what is refused, what is rendered, what is kept, and what Slurm is told."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from nld_train.config.command_help import all_keys
from nld_train.config.compose import Source, compose, to_dict
from nld_train.testing.slurm import Cluster
from slurm import submit
from slurm.submit import Job, num_gpus, slurm_seconds

ROOT = Path(__file__).parents[2]
JOB = ["nodes=2", "gpus_per_node=2"]
SMALL = ["train.micro_batch_size=2", "data.cache_dir=cache"]  # of experiment=tiny, on four ranks


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    def which(name: str) -> str | None:
        return None if name in ("sinfo", "sbatch", "squeue") else shutil.which(name)

    monkeypatch.setattr(submit, "shutil", type("shutil", (), vars(shutil) | {"which": staticmethod(which)}))


@pytest.fixture
def dry_run(no_slurm: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """The script that would be submitted."""

    def run(*settings: str) -> str:
        assert submit.main([*JOB, *SMALL, f"run.dir='{tmp_path}/my 5% run'", *settings, "--dry-run"]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(no_slurm: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """The words of a refusal."""

    def run(*settings: str) -> str:
        assert submit.main([*settings, f"run.dir={tmp_path}/run", "--dry-run"]) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    return run


# Without a cluster ---------------------------------------------------------------------------------------------------


def test_own_settings_are_no_settings_of_train_py() -> None:
    taken = {key.split(".")[0] for key in all_keys()} | {path.name for path in (ROOT / "configs").iterdir()}
    assert not taken & {item.name for item in fields(Job)}


def test_a_script_is_bash_without_anything_left_to_fill_in(dry_run: Callable[..., str], tmp_path: Path) -> None:
    script = dry_run("time=4:00:00", "partition=train", "options=--constraint=h100 --comment='two words'")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert not re.search(r"^#@ ", script, re.MULTILINE)
    directives = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert directives == [
        "--job-name='my 5% run'", "--nodes=2", "--ntasks-per-node=1", "--gres=gpu:2", "--partition=train",
        "--time=4:00:00", "--signal=B:USR1@600", f"--output='{tmp_path}/my 5%% run/slurm/%j.log'",
        "--open-mode=append", "--requeue", "--exclusive", "--mem=0", "--constraint=h100", "'--comment=two words'",
    ]  # fmt: skip
    assert f"python={sys.executable}" in script
    assert not (tmp_path / "my 5% run").exists()


def test_variants(dry_run: Callable[..., str], tmp_path: Path) -> None:
    script = dry_run(
        "launcher=task", "exclusive=false", "name=x", "account=y", "warning=90", "setup=module load cuda; a=1"
    )
    assert "#SBATCH --ntasks-per-node=2\n" in script
    assert "--exclusive" not in script
    assert "#SBATCH --signal=B:USR1@90\n" in script
    assert "launcher=task\n" in script
    assert "\nmodule load cuda; a=1\n" in script
    assert "container=()\n" in script
    script = dry_run("container_image=/images/nld 1.sqsh", "container_mounts=/data:/data")
    assert "python=python\n" in script
    words = subprocess.run(
        ["bash", "-c", re.search(r"^container=.*$", script, re.MULTILINE)[0] + '; printf "%s\\n" "${container[@]}"'],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    here = os.getcwd()
    assert words == [
        "--container-image=/images/nld 1.sqsh",
        f"--container-mounts={tmp_path}/my 5% run:{tmp_path}/my 5% run,{here}:{here},/data:/data",
        f"--container-workdir={here}",
    ]


@pytest.mark.parametrize("written", ["main,spare", "'main,spare'", '"main,spare"'])
def test_a_list_of_partitions_is_written_with_or_without_quotes(dry_run: Callable[..., str], written: str) -> None:
    """They are no part of it; the keys of train.py need them for a comma."""
    assert "#SBATCH --partition=main,spare\n" in dry_run(f"partition={written}")


NODES = """\
main*|n1|idle|gpu:8|2:00:00
main*|n2|idle|gpu:8|2:00:00
spare|n3|idle|gpu:8|1-00:00:00
spare|n4|idle|gpu:4|1-00:00:00"""


@pytest.mark.parametrize(
    ("partition", "nodes", "limit", "problems", "note"),
    [
        ("main,spare", 2, "1:00:00", [], "note: partition spare cannot take the job: nodes: 2 are asked for"),
        ("spare,main", 1, "3:00:00", [], "note: partition main cannot take the job: time: 3:00:00 is more than"),
        ("main,spare", 1, "1:00:00", [], ""),
        ("main,spare", 2, "3:00:00", ["time: 3:00:00 is more than the 2:00:00", "nodes: 2 are asked for"], ""),
        ("mian,spare", 1, "1:00:00", ["did you mean partition=main,spare?"], ""),
        ("mian,qqqqq", 1, "1:00:00", ["use one of main, spare", "qqqqq is not a partition"], ""),
        ("", 2, "1:00:00", [], ""),
    ],
)
def test_one_of_the_partitions_has_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    partition: str, nodes: int, limit: str, problems: list[str], note: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(submit, "_slurm", lambda *command: NODES)
    found = submit.cluster_problems(Job(nodes=nodes, gpus_per_node=8, partition=partition, time=limit))
    assert len(found) == len(problems)
    words = "\n".join(map(str, found))
    assert all(text in words for text in problems), words
    said = capsys.readouterr().err
    assert note in said
    assert bool(said) == bool(note)


def test_every_problem_at_once(refused: Callable[..., str]) -> None:
    words = refused("gpus_per_node=0", "time=soon", "launcher=mpirun", "modle.num_layers=2", "exclusive=perhaps")
    for text in (
        "6 problems", "nodes: is missing", "gpus_per_node: '0' is not", "time: 'soon'",
        "use torchrun or task",
        "modle.num_layers: there is no such key", "exclusive: 'perhaps'",
    ):  # fmt: skip
        assert text in words


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["parallel=tp4"], "train.micro_batch_size"),  # refused for 2 x 3 ranks, as train.py does
        (["train.micro_batch_size=2"], "6 data-parallel ranks"),
        (["parallel=auto", "parallel.memory_gb=1", "model=ministral3_14b"], "no layout of 6 ranks"),
        (["time=5", "warning=400"], "time: 5 is not longer than the warning, 400 seconds"),
        (["warning=70000"], "warning: 70000 is more than Slurm takes"),
        (["container_mounts=a:b"], "container_mounts: is given without container_image"),
        (["python=/no/such/python"], "python: /no/such/python is not a program"),
        (["options='--a"], "options"),
        (["data.corpus=/no/such/folder"], "data.corpus"),
        (["setup=a\nb"], "setup: has more than one line"),
        (["chain=two"], "chain: 'two' is not a positive whole number"),
        (["partition=main, spare"], "several with commas and nothing else between them: partition='main,spare'"),
        (["partition=[main,spare]"], "partition: '[main,spare]' is not a partition or a list of them"),
        (["partition=main,,spare"], "partition: 'main,,spare' is not"),
    ],
)
def test_refusals(refused: Callable[..., str], settings: list[str], words: str) -> None:
    found = refused("nodes=2", "gpus_per_node=3", *settings)
    assert words in found
    assert "remedy" in found


def test_without_slurm_nothing_is_submitted(no_slurm: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert submit.main([*JOB, *SMALL, f"run.dir={tmp_path}/run"]) == 2
    assert "Slurm's commands are not installed here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800), ("30:15", 1815), ("4:00:00", 14400), ("2-0", 172800), ("1-12:30", 131400), ("1-0:0:5", 86405),
        ("infinite", float("inf")), ("UNLIMITED", float("inf")), ("", None), ("4h", None), ("1:2:3:4", None),
    ],
)  # fmt: skip
def test_times(text: str, seconds: float | None) -> None:
    assert slurm_seconds(text) == seconds


@pytest.mark.parametrize(
    ("resources", "count"),
    [
        ("gpu:8", 8), ("gpu:h100:4(S:0-1)", 4), ("gpu:a100:2,gpu:h100:4,nvme:3", 6), ("(null)", 0), ("nogpu:3", 0),
        ("nvme:1,gpu:tesla:16(IDX:0-15)", 16),
    ],
)  # fmt: skip
def test_gpus_of_a_node(resources: str, count: int) -> None:
    assert num_gpus(resources) == count


def test_the_kept_configuration_is_the_checked_one(tmp_path: Path) -> None:
    """Written and read back through train.py's own composition; stages keep their order."""
    overrides = [
        f"run.dir={tmp_path}/run", "+stage@stages.more=joint", "stages.more.tokens=4096", "stages.more.lr=1e-4",
        "stages.more.min_lr=0", "export.prompt='a: \"b\" ${c} #d'".replace("${c}", "{c}"), "data=python",
    ]  # fmt: skip
    config = compose(overrides, world_size=1)
    submit.write_submission(tmp_path / "run/slurm/001", "script", config, ["words"])
    again = compose([], world_size=1, source=Source(config_path=tmp_path / "run/slurm/001"))
    assert to_dict(again) == to_dict(config)
    assert list(again.stages) == ["ar", "joint", "more"]
    assert "defaults" in yaml.safe_load((tmp_path / "run/slurm/001/config.yaml").read_text())
    record = json.loads((tmp_path / "run/slurm/001/submission.json").read_text())
    assert record["command"] == ["slurm/submit.py", "words"]
    assert re.match(r"[0-9a-f]{40}", record["commit"])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one's own in the place of the project."""
    root = tmp_path / "project"
    root.mkdir()
    for name, text in {
        "tracked.py": "1",
        ".gitignore": "ignored\n",
        "ignored": "2",
        "new.py": "3",
        "runs/a/x": "4",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e@x"]
    for command in (["init", "-q"], ["add", "tracked.py", ".gitignore"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(submit, "ROOT", root)
    return root


def test_the_kept_code_is_what_git_does_not_ignore(project: Path) -> None:
    (project / "tracked.py").write_text("changed")
    (project / "gone.py").write_text("")
    subprocess.run(["git", "-C", str(project), "add", "gone.py"], check=True)
    (project / "gone.py").unlink()
    assert sorted(submit.tracked_files(project / "runs/a")) == [".gitignore", "new.py", "tracked.py"]
    assert "runs/a/x" in submit.tracked_files(project / "runs/b")


def test_code_that_is_no_code_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "MAX_SNAPSHOT_BYTES", 1000)
    (project / "weights.bin").write_bytes(bytes(2000))
    with pytest.raises(submit.ConfigError, match=r"largest file is weights\.bin"):
        submit.tracked_files(project / "runs")


def test_a_project_without_git_is_refused(project: Path) -> None:
    shutil.rmtree(project / ".git")
    with pytest.raises(submit.ConfigError, match="submit from a clone"):
        submit.tracked_files(project / "runs")


def test_a_chain_that_slurm_cuts_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that stand for Slurm's, since this cluster has no limit of jobs: the third is refused."""
    count = f'echo x >> "{tmp_path}/count"; n=$(wc -l < "{tmp_path}/count")'
    for name, lines in {
        "sbatch": f'{count}; [ $n -lt 3 ] && echo 10$n && exit\necho "sbatch: error: full" >&2; exit 1',
        "scancel": f'echo "$@" > "{tmp_path}/taken back"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(submit.ConfigError, match="full"):
        submit.submit(tmp_path, 5)
    assert (tmp_path / "taken back").read_text() == "101 102\n"


# On a cluster --------------------------------------------------------------------------------------------------------


def submit_on(cluster: Cluster, run_dir: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "slurm/submit.py"), *JOB, *SMALL, f"run.dir={run_dir}", *settings]
    return cluster.run(command, PYTHONPATH=str(ROOT))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["partition=mian"], "did you mean partition=main?"),
        (["partition=urgent,mian"], "did you mean partition=urgent,main?"),
        (["nodes=4", "train.micro_batch_size=1"], "nodes: 4 are asked for, and partition main has 3 with 2 GPUs"),
        (["partition=urgent"], "use nodes=1 at most"),
        (["gpus_per_node=16", "nodes=1", "train.global_batch_size=32"], "use gpus_per_node=8"),
        (["time=3:00:00"], "time: 3:00:00 is more than the 2:00:00 of partition main"),
        (["options=--dependency=nonsense"], "sbatch: "),
        (["options=--reservation=none"], "sbatch: "),
    ],
)
def test_what_the_cluster_cannot_do_is_refused(
    cluster: Cluster, tmp_path: Path, settings: list[str], words: str
) -> None:
    found = submit_on(cluster, tmp_path / "run", *settings)
    assert found.returncode == 2, found.stdout
    assert words in found.stderr
    assert "remedy" in found.stderr
    assert not (tmp_path / "run").exists()
    assert cluster.slurm("squeue", "-h") == ""


def test_a_chain_waits_in_order_and_a_second_submission_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    """Held, so that nothing of it starts."""
    run_dir = tmp_path / "100% of a run"
    found = submit_on(cluster, run_dir, f"run.dir='{run_dir}'", "chain=3", "options=--hold", "partition=main,urgent")
    assert found.returncode == 0, found.stderr
    jobs = (run_dir / "slurm/001/jobs").read_text().split()
    assert len(jobs) == 3
    assert f"jobs {jobs[0]} to {jobs[2]}" in found.stdout
    shown = [cluster.job(job) for job in jobs]
    assert [job["Dependency"] for job in shown] == [
        "(null)",
        f"afterok:{jobs[0]}(unfulfilled)",
        f"afterok:{jobs[1]}(unfulfilled)",
    ]
    assert "100% of a run" in cluster.slurm("scontrol", "show", "job", jobs[0])
    assert all((job["Requeue"], job["Partition"]) == ("1", "main,urgent") for job in shown)
    assert "note: partition urgent cannot take the job: nodes: 2 are asked for" in found.stderr
    assert (run_dir / "slurm/001/code/train.py").read_bytes() == (ROOT / "train.py").read_bytes()
    assert not (run_dir / "slurm/001/code/.git").exists()

    again = submit_on(cluster, run_dir, f"run.dir='{run_dir}'")
    assert again.returncode == 2
    assert f"{run_dir} has jobs that are queued or running: {', '.join(jobs)}" in again.stderr
    assert not (run_dir / "slurm/002").exists()

    assert all(job["KillOInInvalidDependent"] == "Yes" for job in shown[1:])
    cluster.run(["scancel", *jobs])
    assert submit_on(cluster, run_dir, f"run.dir='{run_dir}'", "--dry-run").returncode == 0
