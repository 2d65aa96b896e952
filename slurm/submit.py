#!/usr/bin/env python
"""Submit a run to Slurm: check it, keep its code and configuration in its folder, and queue one job or a chain.

    python slurm/submit.py nodes=32 gpus_per_node=8 partition=train time=4:00:00 chain=10 experiment=nld_8b \\
        data.corpus=FOLDER init.hf_path=FOLDER run.dir=/shared/runs/nld_8b
    python slurm/submit.py nodes=2 gpus_per_node=8 run.dir=/shared/runs/try --dry-run      prints the script

What is not in the list below is for train.py: groups and keys. The whole is checked before anything is submitted, for
nodes x gpus_per_node ranks, against the cluster, and against the run that is in run.dir already. run.dir has to lie on
a file system that all nodes share. Submitting the same run again goes on with it; without a chain a job goes on by
itself, back in the queue, until the run is finished. docs/operations.md says how to watch, stop and resume it.
"""

import argparse
import difflib
import getpass
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import nld_train
from nld_train.config.compose import EXIT_BAD_CONFIG, EXIT_FAILED, EXIT_OK, Source, compose, compose_unlaunched, to_dict
from nld_train.config.plan import choose_layout
from nld_train.config.schema import Config
from nld_train.errors import ConfigError, NLDError, Problem

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = Path(__file__).resolve().parent / "train.sbatch"
MAX_SNAPSHOT_BYTES = 200 * 2**20
LAUNCHERS = ("torchrun", "task")
MAX_IDLE_STARTS = 3  # starts of a submission, one after the other, that leave no newer checkpoint

# Hydra's own settings stand in configs/config.yaml, which a resolved configuration does without.
CONFIG_HEADER = """\
# The run as it was submitted, every value. By hand: train.py --config-path THIS_FOLDER --config-name config
defaults: [schema, _self_, override hydra/job_logging: none, override hydra/hydra_logging: none]
hydra: {output_subdir: null, run: {dir: .}, job: {name: train, chdir: false}}
"""


def option(help: str, **default: Any) -> Any:
    return field(metadata={"help": help}, **default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The job's own settings: everything else on the command line is for train.py."""

    nodes: int = option("nodes of each job")
    gpus_per_node: int = option("GPUs of a node, one rank each")
    partition: str = option(
        "where to queue, or several to choose from: main,spare; default: the cluster's default partition", default=""
    )
    time: str = option(
        "limit of each job, as Slurm writes it: 4:00:00, 2-00:00:00; default: the partition's", default=""
    )
    warning: int = option("seconds before that limit at which the run is told to save", default=600)
    chain: int = option(
        "jobs, each goes on where the one before stopped; default 1: one that requeues itself", default=1
    )
    launcher: str = option("torchrun (one per node) or task (srun starts the ranks)", default="torchrun")
    name: str = option("of the job; default: the name of run.dir", default="")
    account: str = option("to charge", default="")
    exclusive: bool = option("true: whole nodes, all of their memory and cores", default=True)
    options: str = option("more options of sbatch, as one text: '--constraint=h100 --reservation=x'", default="")
    python: str = option("interpreter on the nodes; default: this one (in a container: python)", default="")
    setup: str = option("line of bash before the start: 'module load cuda; export NCCL_DEBUG=WARN'", default="")
    container_image: str = option("image of srun --container-image (pyxis); default: none", default="")
    container_mounts: str = option("more folders for the container, as a:b,c:d", default="")

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_option_table(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="+", metavar="KEY=VALUE", help="of the job, and what train.py takes")
    parser.add_argument("--dry-run", action="store_true", help="print the script; submit and write nothing")
    parser.add_argument("--config-dir", metavar="FOLDER", help="your own configuration files, as for train.py")
    arguments = parser.parse_intermixed_args(argv)
    try:
        has_slurm = reach_slurm(is_needed=not arguments.dry_run)
        job, config = check(arguments.settings, arguments.config_dir, has_slurm=has_slurm)
        run_dir = Path(config.run.dir).absolute()
        earlier = [int(path.name) for path in run_dir.glob("slurm/*") if path.name.isdigit()]
        submission = run_dir / "slurm" / f"{max(earlier, default=0) + 1:03d}"
        script = render(job, submission, run_dir)
        if has_slurm:
            test_script(script)
        if arguments.dry_run:
            print(script, end="")
            return EXIT_OK
        write_submission(submission, script, config, sys.argv[1:] if argv is None else argv)
        jobs = submit(submission, job.chain)
    except NLDError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED
    names = jobs[0] if len(jobs) == 1 else f"{jobs[0]} to {jobs[-1]}"
    print(f"submitted: job{'s' * (len(jobs) > 1)} {names}, {job.nodes} nodes x {job.gpus_per_node} ranks")
    print(f"  messages      {run_dir}/slurm/{jobs[0]}.log")
    print(f"  progress      {run_dir}/heartbeat.json")
    print(f"  code, config  {submission}")
    print(f"  to end it     scancel --signal=TERM --batch {jobs[0]}    (saves first)")
    return EXIT_OK


# The settings --------------------------------------------------------------------------------------------------------


def _option_table() -> str:
    names = [item.name for item in fields(Job)]
    width = max(map(len, names))
    lines = [f"  {item.name:<{width}}  {item.metadata['help']}" for item in fields(Job)]
    return "\n".join(["settings of the job (the first two have to be given):", *lines])


def check(settings: Sequence[str], config_dir: str | None, *, has_slurm: bool) -> tuple[Job, Config]:
    """Everything that can be known before the submission, all problems at once.

    Args:
        config_dir: the user's own configuration files.
        has_slurm: False: the cluster is not looked at.

    Raises:
        ConfigError: of the job's settings, of the configuration at the job's number of ranks, of the cluster, of
            the run that is in the folder already.
    """
    problems: list[Problem] = []
    own, overrides = split_settings(settings)
    job = parse_job(own, problems)
    config: Config | None = None
    source = Source(extra_dir=Path(config_dir).absolute() if config_dir is not None else None)
    try:
        if job is None:  # rules about the ranks would be about a guess
            compose_unlaunched(overrides, source=source)
        else:
            if not any(line.startswith("machine.gpus_per_node=") for line in overrides):
                overrides = [*overrides, f"machine.gpus_per_node={job.gpus_per_node}"]
            config = compose(overrides, world_size=job.world_size, source=source)
            if config.parallel.auto and config.parallel.memory_gb is not None:
                choose_layout(config, job.world_size, config.parallel.memory_gb)
    except ConfigError as error:
        problems += error.problems
    if Path(nld_train.__path__[0]).resolve().parent != ROOT:
        remedy = "use the Python environment of this checkout"
        problems.append(Problem("nld_train", f"is imported from {nld_train.__path__[0]}, not from {ROOT}", remedy))
    if job is not None and has_slurm:
        problems += cluster_problems(job)
    if config is not None:
        problems += folder_problems(config, has_slurm=has_slurm)
    if problems or job is None or config is None:
        raise ConfigError(problems)
    return job, config


def split_settings(settings: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The job's settings, and train.py's."""
    known = {item.name for item in fields(Job)}
    own: dict[str, str] = {}
    overrides = []
    for setting in settings:
        key, equals, value = setting.partition("=")
        if equals and key in known:
            own[key] = value
        else:
            overrides.append(setting)
    return own, overrides


def parse_job(own: Mapping[str, str], problems: list[Problem]) -> Job | None:
    """The job's settings with their types; None where one of them cannot be read, and why in ``problems``."""
    values: dict[str, Any] = {}
    count = len(problems)
    for item in fields(Job):
        kind: Any = item.type
        if item.name not in own:
            if item.default is MISSING:
                problems.append(Problem(item.name, "is missing", f"give it, as in {item.name}=8"))
            continue
        text = own[item.name]
        if item.name == "partition":  # a list, which the keys of train.py would want in quotes: with or without
            text = re.sub(r"""^(['"])(.*)\1$""", r"\2", text)
        if kind is int and not (re.fullmatch(r"[0-9]+", text) and int(text) > 0):
            problems.append(Problem(item.name, f"{text!r} is not a positive whole number", f"give one: {item.name}=8"))
        elif kind is bool and text.lower() not in ("true", "false"):
            problems.append(Problem(item.name, f"{text!r} is not true or false", f"give {item.name}=true or false"))
        elif item.name == "time" and slurm_seconds(text) is None:
            remedy = "give hours:minutes:seconds or days-hours:minutes:seconds"
            problems.append(Problem(item.name, f"{text!r} is not a time", remedy))
        elif item.name == "launcher" and text not in LAUNCHERS:
            problems.append(Problem(item.name, f"{text!r} is no launcher", f"use {' or '.join(LAUNCHERS)}"))
        elif item.name == "partition" and not re.fullmatch(r"([^\s,'\"\[\]]+(,[^\s,'\"\[\]]+)*)?", text):
            remedy = "give one, or several with commas and nothing else between them: partition='main,spare'"
            problems.append(Problem(item.name, f"{text!r} is not a partition or a list of them", remedy))
        elif "\n" in text:
            problems.append(Problem(item.name, "has more than one line", "give one line"))
        else:
            values[item.name] = text.lower() == "true" if kind is bool else kind(text)
    if len(problems) > count:
        return None
    job = Job(**values)
    problems += _job_rules(job)
    return job


def _job_rules(job: Job) -> Iterable[Problem]:
    seconds = slurm_seconds(job.time) if job.time else None
    if seconds is not None and seconds <= job.warning:
        what = f"{job.time} is not longer than the warning, {job.warning} seconds before its end"
        yield Problem("time", what, f"give a longer time, or warning={max(1, int(seconds) // 4)}")
    if job.warning > 65535:
        yield Problem("warning", f"{job.warning} is more than Slurm takes", "use warning=65535 at most")
    if job.container_mounts and not job.container_image:
        yield Problem("container_mounts", "is given without container_image", "give the image, or leave it out")
    if job.python and not job.container_image and shutil.which(job.python) is None:
        yield Problem("python", f"{job.python} is not a program", "give the interpreter of the environment to use")
    try:
        shlex.split(job.options)
    except ValueError as error:
        yield Problem("options", f"{job.options!r} cannot be read: {error}", "quote it as for a shell")


def slurm_seconds(text: str) -> float | None:
    """Seconds of a time as Slurm writes it; infinite for no limit, None for what is no time.

    Minutes, minutes:seconds, hours:minutes:seconds, and days-hours[:minutes[:seconds]].
    """
    if text.lower() in ("infinite", "unlimited"):
        return float("inf")
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return None
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


# What is there: the cluster, and the run -----------------------------------------------------------------------------


def reach_slurm(*, is_needed: bool) -> bool:
    """Are Slurm's commands here, and does its controller answer?

    Raises:
        ConfigError: not, and it is needed.
    """
    if shutil.which("sinfo") is None:
        what = "Slurm's commands are not installed here"
    else:
        found = subprocess.run(["sinfo", "-h"], capture_output=True, text=True, check=False)
        if found.returncode == 0:
            return True
        what = f"Slurm does not answer: {' '.join(found.stderr.split())}"
    if is_needed:
        raise ConfigError([Problem("sinfo", what, "submit where sinfo works; --dry-run prints the script anywhere")])
    print(f"note: the cluster is not looked at: {what}", file=sys.stderr)
    return False


def cluster_problems(job: Job) -> list[Problem]:
    """What the cluster cannot give: Slurm takes such a job and lets it wait for ever. Of several partitions one is
    enough; a note says which cannot."""
    lines = [line.split("|") for line in _slurm("sinfo", "-hN", "-o", "%P|%N|%t|%G|%l").splitlines()]
    names = list(dict.fromkeys(line[0].rstrip("*") for line in lines))
    default = next((line[0].rstrip("*") for line in lines if line[0].endswith("*")), None)
    partition = job.partition or default
    if partition is None:
        return [Problem("partition", "is not given, and the cluster has no default", f"use one of {', '.join(names)}")]
    wanted = partition.split(",")
    if unknown := [name for name in wanted if name not in names]:
        guesses = {name: difflib.get_close_matches(name, names, n=1) for name in unknown}
        meant = ",".join(guesses[name][0] if guesses.get(name) else name for name in wanted)
        remedy = f"did you mean partition={meant}?" if all(guesses.values()) else f"use one of {', '.join(names)}"
        return [Problem("partition", f"{name} is not a partition of this cluster", remedy) for name in unknown]
    of_each = {
        name: _partition_problems(job, name, [line for line in lines if line[0].rstrip("*") == name]) for name in wanted
    }
    if all(of_each.values()):
        return [problem for problems in of_each.values() for problem in problems]
    for name, problems in of_each.items():
        for problem in problems:
            print(f"note: partition {name} cannot take the job: {problem}", file=sys.stderr)
    return []


def _partition_problems(job: Job, partition: str, nodes: Sequence[Sequence[str]]) -> list[Problem]:
    """What one partition cannot give.

    Args:
        nodes: of each the words of sinfo: partition, name, state, resources, limit of the time.
    """
    problems = []
    able = [line for line in nodes if num_gpus(line[3]) >= job.gpus_per_node]
    if not able:
        most = max(num_gpus(line[3]) for line in nodes)
        remedy = f"use gpus_per_node={most}" if most else "use another partition"
        what = f"no node of partition {partition} has {job.gpus_per_node} GPUs; the most is {most}"
        problems.append(Problem("gpus_per_node", what, remedy))
    elif len(able) < job.nodes:
        what = f"{job.nodes} are asked for, and partition {partition} has {len(able)} with {job.gpus_per_node} GPUs"
        problems.append(Problem("nodes", what, f"use nodes={len(able)} at most, or another partition"))
    elif len(up := [line for line in able if re.match(r"(idle|mix|alloc|comp|plnd|resv)[^*]*$", line[2])]) < job.nodes:
        print(f"note: only {len(up)} of {len(able)} nodes are up: the job waits until {job.nodes} are", file=sys.stderr)
    limit = slurm_seconds(nodes[0][4])
    wanted = slurm_seconds(job.time) if job.time else None
    if wanted is not None and limit is not None and wanted > limit:
        what = f"{job.time} is more than the {nodes[0][4]} of partition {partition}"
        problems.append(Problem("time", what, f"use time={nodes[0][4]}, and chain=N for a longer run"))
    return problems


def num_gpus(resources: str) -> int:
    """GPUs of a node: ``gpu:8``, ``gpu:h100:8(S:0-1),nvme:2``, ``(null)``."""
    return sum(int(number) for number in re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", resources))


def folder_problems(config: Config, *, has_slurm: bool) -> list[Problem]:
    """What is in the run's folder already: jobs that are queued or run, and a run that is another one."""
    run_dir = Path(config.run.dir)
    known = {line for path in run_dir.glob("slurm/*/jobs") for line in path.read_text().split()}
    queued = set(_slurm("squeue", "-h", "-o", "%A").split()) if known and has_slurm else set()
    if alive := sorted(known & queued, key=int):
        what = f"{run_dir} has jobs that are queued or running: {', '.join(alive)}"
        return [Problem("run.dir", what, f"wait, or end them first: scancel {' '.join(alive)}")]
    if not any(run_dir.glob("checkpoints/step_*")):
        return []
    # Imported here: torch and Megatron take seconds, and most submissions do without them.
    from nld_train.checkpoint.manager import latest_checkpoint, read_info
    from nld_train.training.run_folder import check_resumable
    from nld_train.training.stages import plan_stages

    newest = latest_checkpoint(run_dir / "checkpoints")
    try:
        if newest is not None:
            check_resumable(read_info(newest), config, plan_stages(config), newest)
    except ConfigError as error:
        return list(error.problems)
    except NLDError as error:
        print(f"note: {error}", file=sys.stderr)  # a start takes the one before it
    return []


# The script, and what it runs ----------------------------------------------------------------------------------------


def render(job: Job, submission: Path, run_dir: Path) -> str:
    """The job's script: ``train.sbatch`` with its two lines of ``#@`` replaced."""
    directives = {
        "job-name": job.name or run_dir.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(1 if job.launcher == "torchrun" else job.gpus_per_node),
        "gres": f"gpu:{job.gpus_per_node}",
        "partition": job.partition,
        "account": job.account,
        "time": job.time,
        "signal": f"B:USR1@{job.warning}",
        "output": str(run_dir).replace("%", "%%") + "/slurm/%j.log",
        "open-mode": "append",
    }
    lines = [f"--{name}={shlex.quote(value)}" for name, value in directives.items() if value]
    lines += ["--requeue", *(["--exclusive", "--mem=0"] if job.exclusive else [])]
    lines += [shlex.quote(word) for word in shlex.split(job.options)]
    container = []
    if job.container_image:
        mounts = [f"{folder}:{folder}" for folder in dict.fromkeys((str(run_dir), os.getcwd()))]
        container = [
            f"--container-image={job.container_image}",
            f"--container-mounts={','.join([*mounts, *filter(None, [job.container_mounts])])}",
            f"--container-workdir={os.getcwd()}",
        ]
    settings = {
        "run_dir": shlex.quote(str(run_dir)),
        "submission": shlex.quote(str(submission)),
        "work_dir": shlex.quote(os.getcwd()),
        "python": shlex.quote(job.python or ("python" if job.container_image else sys.executable)),
        "launcher": job.launcher,
        "ranks_per_node": str(job.gpus_per_node),
        "max_idle_starts": str(MAX_IDLE_STARTS),
        "container": f"({' '.join(map(shlex.quote, container))})",
    }
    blocks = {
        "directives": "\n".join(f"#SBATCH {line}" for line in lines),
        "settings": "\n".join([*(f"{name}={value}" for name, value in settings.items()), *filter(None, [job.setup])]),
    }
    return re.sub(r"^#@ (\w+)$", lambda match: blocks[match[1]], TEMPLATE.read_text(), flags=re.MULTILINE)


def test_script(script: str) -> None:
    """Ask Slurm whether it would take the job: accounts, limits, options.

    Raises:
        ConfigError: it would not.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
        file.write(script)
        file.flush()
        _slurm("sbatch", "--test-only", file.name)


def _slurm(*command: str) -> str:
    """What one of Slurm's commands prints.

    Raises:
        ConfigError: it fails, with its words.
    """
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        words = " ".join(line.removeprefix(f"{command[0]}: ") for line in found.stderr.splitlines())
        raise ConfigError(
            [Problem(command[0], words or f"fails with status {found.returncode}", "change what it names")]
        )
    return found.stdout.strip()


def write_submission(submission: Path, script: str, config: Config, argv: Sequence[str]) -> None:
    """Make the folder of this submission: the code, the configuration, the script, and where they are from.

    Raises:
        ConfigError: the folder cannot be written, or the code is not kept by git or too large to copy.
    """
    files = tracked_files(Path(config.run.dir).resolve())
    try:
        submission.mkdir(parents=True)
    except OSError as error:
        what = f"{submission} cannot be created ({error.strerror})"
        raise ConfigError([Problem("run.dir", what, "name a folder that you may write to")]) from error
    try:
        for name in files:
            target = submission / "code" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
        (submission / "config.yaml").write_text(CONFIG_HEADER + OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))
        (submission / "train.sbatch").write_text(script)
        record = {
            "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "user": getpass.getuser(),
            "host": socket.gethostname(),
            "folder": os.getcwd(),
            "command": ["slurm/submit.py", *argv],
            "commit": _git("describe", "--always", "--dirty", "--abbrev=40").strip(),
        }
        (submission / "submission.json").write_text(json.dumps(record, indent=2) + "\n")
    except BaseException:
        shutil.rmtree(submission)
        raise


def tracked_files(run_dir: Path) -> list[str]:
    """The project's files as git sees them, ignored ones left out, relative to its folder; none of ``run_dir``.

    Raises:
        ConfigError: the project is no git repository, or too much would be copied.
    """
    listed = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    names = [name for name in dict.fromkeys(listed) if name and (ROOT / name).is_file()]
    names = [name for name in names if not (ROOT / name).resolve().is_relative_to(run_dir)]
    sizes = {name: (ROOT / name).stat().st_size for name in names}
    if sum(sizes.values()) > MAX_SNAPSHOT_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        what = f"the code would be a copy of {sum(sizes.values()) / 2**20:.0f} MB; the largest file is {largest}"
        raise ConfigError([Problem(str(ROOT), what, "name in .gitignore what is no part of the code")])
    return names


def _git(*arguments: str) -> str:
    try:
        found = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError([Problem("git", "is not installed", "install it: it says what the code is")]) from None
    if found.returncode:
        words = found.stderr.strip().partition("\n")[0]
        raise ConfigError(
            [Problem(str(ROOT), f"git {arguments[0]} fails: {words}", "submit from a clone of the project")]
        )
    return found.stdout


def submit(submission: Path, chain: int) -> list[str]:
    """Queue the jobs; each waits for the one before to end well. Returns their numbers, also in the file ``jobs``.

    Raises:
        ConfigError: Slurm refuses one; those before it are taken back.
    """
    jobs: list[str] = []
    try:
        for _ in range(chain):
            after = [f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
            jobs.append(_slurm("sbatch", "--parsable", *after, str(submission / "train.sbatch")).partition(";")[0])
            with (submission / "jobs").open("a") as file:
                file.write(f"{jobs[-1]}\n")
    except BaseException:
        if jobs:
            subprocess.run(["scancel", *jobs], check=False)
        raise
    return jobs


if __name__ == "__main__":
    sys.exit(main())
