"""Runs as one HTML page that needs nothing else: figures are SVG inside it, their colours follow light and dark.

A run's folder is read as it is: ``config.yaml`` and ``metrics.jsonl`` must be there; ``heartbeat.json``, ``train.log``
(starts, continuations of the prompt) and ``evaluation/*.json`` of ``scripts/evaluate.py`` are shown where they are. No
torch, unless there are evaluations to draw.
"""

import io
import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nld_train.errors import DataError
from nld_train.evaluation import curves
from nld_train.evaluation.reports import Run, differing_keys, load_run
from nld_train.evaluation.tables import Table, from_json, tables_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUITES = ("likelihood", "decoding", "speed_of_light", "harness")
_LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)  (.*)")
_START = re.compile(r"run +.* (?:starts|resumes after step (\d+) of \d+)$")
_END = re.compile(r"run (?:finished|stopped): ")
_SAMPLE = re.compile(r"\[(ar|diffusion|linear|quadratic)\] (\d+ tokens, \d+ forwards, [\d.]+ tokens per forward)$")

_USAGE = (
    ("MFU", "mfu", "{median:.1%} (median)"),
    ("device memory", "device_memory_gb", "{most:.1f} GiB at most (rank 0)"),
    ("host memory", "host_memory_gb", "{most:.1f} GiB at most (rank 0)"),
)
_NEW_HEARTBEAT = "remove the file: the run writes it anew"

_COLORS = {
    "#000000": "currentColor",
    "#ffffff": "var(--page)",
    curves.INK_COLOR: "var(--ink)",
    curves.PALE_COLOR: "var(--pale)",
    curves.AR_COLOR: "var(--ar)",
    curves.DIFFUSION_COLOR: "var(--diffusion)",
    curves.LINEAR_COLOR: "var(--linear)",
    curves.QUADRATIC_COLOR: "var(--quadratic)",
}
"""What stands in a figure for what the page's style decides; the other colours are legible on both."""

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1c1c1e; --ink: #444444; --pale: #888888; --rule: #d8d8dc;
  --ar: #1f5fa8; --diffusion: #c8541b; --linear: #3a8a3f; --quadratic: #7a3f98; }
@media (prefers-color-scheme: dark) {
  :root { --page: #17181b; --text: #e6e6e8; --ink: #bcbcc2; --pale: #8c8c92; --rule: #3a3b40;
    --ar: #6aa9ef; --diffusion: #f08a52; --linear: #6cc272; --quadratic: #c08ae0; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 120rem; background: var(--page); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: .4rem 0; overflow-wrap: anywhere; }
.runs { display: grid; gap: 1.5rem; overflow-x: auto; }
.runs > * { min-width: 0; }
.one { max-width: 62rem; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: currentColor; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .4rem 0 1rem; }
th, td { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; }
tr + tr > * { border-top: 1px solid var(--rule); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; margin: .2rem 0 .8rem;
  padding: .5rem .7rem; border: 1px solid var(--rule); border-radius: 4px; }
.quiet { color: var(--pale); }
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """The export's prompt continued in one mode; ``figures``: tokens, forwards and their ratio, as they were logged."""

    mode: str
    figures: str
    text: str


@dataclass(frozen=True, slots=True)
class Subject:
    """A run and what else lies in its folder.

    Args:
        name: on the page; unlike those of the other runs.
        starts: when the run was started, and the last finished step it began from.
        heartbeat: None where there is none.
        evaluations: by suite, the whole file.
    """

    name: str
    run: Run
    starts: Sequence[tuple[str, int]] = ()
    samples: Sequence[Sample] = ()
    heartbeat: Mapping[str, Any] | None = None
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def resumed_after(self) -> list[int]:
        """Steps of the checkpoints that later starts began from."""
        return [step for _, step in self.starts[1:]]


def read_subject(folder: Path, name: str) -> Subject:
    """Read a run's folder.

    Raises:
        DataError: what every run has is missing, or a file is damaged; names the file.
    """
    run = load_run(folder)
    starts, samples = _read_log(folder / "train.log")
    heartbeat = folder / "heartbeat.json"
    return Subject(
        name,
        run,
        starts,
        samples,
        _read_json(heartbeat, _NEW_HEARTBEAT) if heartbeat.is_file() else None,
        {
            suite: _read_json(path, "evaluate again, or remove the file")
            for suite in _SUITES
            if (path := folder / "evaluation" / f"{suite}.json").is_file()
        },
    )


def build_page(folders: Sequence[Path]) -> str:
    """The page of one or several runs, which stand side by side.

    Raises:
        DataError: a folder is no run's, or damaged; names the file.
    """
    subjects = [read_subject(folder, name) for folder, name in zip(folders, _short_names(folders), strict=True)]
    title = f"Report: {', '.join(subject.name for subject in subjects)}"
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="quiet">written {datetime.now():%Y-%m-%d %H:%M}</p>']
    parts.append(_section("Overview", _html_table(_overview(subjects))))
    # Drawn before what runs have in common: here an error names the run that it is in.
    sections = [
        _side_by_side(heading, [make(subject, f"r{i}") for i, subject in enumerate(subjects)], subjects)
        for heading, make in (
            ("Losses by stage", _losses),
            ("Loss by masked share", _buckets),
            ("Speed", _speed),
            ("Utilisation and memory", _usage),
            ("Starts", _starts),
            ("Samples", _samples),
        )
    ]
    if len(subjects) > 1:
        settings = _differences(subjects)
        if settings.lines:
            parts.append(_section("Settings that differ", _html_table(settings)))
        figure = curves.draw_validations({subject.name: subject.run.metrics for subject in subjects})
        if figure is not None:
            parts.append(_section("Validation losses", f'<div class="one">{_svg(figure, "validations")}</div>'))
    parts += sections
    for suite in _SUITES:
        cells = [_evaluation(subject, suite, f"r{number}") for number, subject in enumerate(subjects)]
        parts.append(_side_by_side(f"Evaluation: {suite.replace('_', ' ')}", cells, subjects))
    # The policy makes a browser refuse, and report, whatever this page would load from elsewhere.
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body>\n</html>\n"
    )


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The folders' last parts, as many as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise DataError(str(folders[0]), "is named twice", "name each run once")


@contextmanager
def _blaming(path: Path, what: str, remedy: str) -> Iterator[None]:
    """An error of the context says that ``path`` is not ``what``."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError) as error:
        raise DataError(str(path), f"is not {what} ({type(error).__name__}: {error})", remedy) from error


def _blaming_metrics(subject: Subject) -> AbstractContextManager[None]:
    return _blaming(subject.run.folder / "metrics.jsonl", "a run's metrics", "restore the file")


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(str(path), f"is not JSON: {error}", remedy) from error
    if not isinstance(found, dict):
        raise DataError(str(path), f"holds {type(found).__name__}, not an object", remedy)
    return found


def _read_log(path: Path) -> tuple[list[tuple[str, int]], list[Sample]]:
    """Starts, and the last continuation of each mode; nothing where there is no log."""
    starts: list[tuple[str, int]] = []
    samples: dict[str, tuple[str, list[str]]] = {}
    open_lines: list[str] | None = None
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for match in filter(None, map(_LOG_LINE.fullmatch, text.split("\n"))):
        time, line = match.groups()
        start, sample = _START.match(line), _SAMPLE.match(line)
        if start:
            starts.append((time, int(start.group(1) or 0)))
        if sample:
            open_lines = []
            samples[sample.group(1)] = (sample.group(2), open_lines)
        elif start or _END.match(line):
            open_lines = None
        elif open_lines is not None:
            open_lines.append(line)
    return starts, [Sample(mode, figures, "\n".join(lines)) for mode, (figures, lines) in samples.items()]


def _overview(subjects: Sequence[Subject]) -> Table:
    columns = [_facts(subject) for subject in subjects]
    names = dict.fromkeys(name for column in columns for name in column)
    lines = [[name, *(column.get(name, "") for column in columns)] for name in names]
    return Table(["", *(subject.name for subject in subjects)], lines)


def _facts(subject: Subject) -> dict[str, str]:
    run, heartbeat = subject.run, subject.heartbeat
    last = run.metrics.steps[-1]
    setting = run.settings
    restarts = len(subject.starts) - 1 if heartbeat is None else heartbeat.get("restarts")
    with _blaming(run.folder / "config.yaml", "a run's configuration", "restore the file"):
        facts = {
            "folder": str(run.folder),
            "state": "finished" if last["tokens"] >= run.num_tokens else "not finished",
            "steps": f"{last['step']:,}",
            "clean tokens": f"{last['tokens']:,} of {run.num_tokens:,}",
            "model": f"{setting['model.num_layers']} layers, hidden {setting['model.hidden_size']}, "
            f"vocabulary {setting['model.vocab_size']:,}",
            "batch": f"{setting['train.global_batch_size']} x {setting['data.sequence_length']} tokens",
            "seed": str(run.seed),
        }
        stages = {
            name: f"alpha {setting[f'stages.{name}.diffusion_loss_weight']:g}, "
            f"{setting[f'stages.{name}.tokens']:,} tokens"
            for name in run.stages
        }
    if heartbeat is not None:
        message = heartbeat.get("message")
        facts["state"] = str(heartbeat.get("state")) + (f": {message}" if message else "")
        if isinstance(heartbeat.get("time"), int | float):
            with _blaming(run.folder / "heartbeat.json", "a run's heartbeat", _NEW_HEARTBEAT):
                facts["last heartbeat"] = f"{datetime.fromtimestamp(heartbeat['time']):%Y-%m-%d %H:%M:%S}"
        facts["ranks"] = str(heartbeat.get("world_size"))
    if heartbeat is not None or subject.starts:
        facts["restarts"] = str(restarts)
    with _blaming_metrics(subject):
        for name, about in stages.items():
            records = [record for record in run.metrics.steps if record["stage"] == name]
            rates = [record["tokens_per_second"] for record in records if record["tokens_per_second"] is not None]
            done = f"{statistics.median(rates):,.0f} tokens/s (median)" if rates else "not begun"
            facts[f"stage {name}"] = f"{about}, {done}"
        for name, label, _, _ in curves.FAULTS:
            marked = [record["step"] for record in run.metrics.steps if record.get(name)]
            if marked:
                facts[label] = f"{len(marked):,}, the last is step {marked[-1]:,}"
        for label, key, form in _USAGE:
            values = [record[key] for record in run.metrics.steps if record.get(key) is not None]
            if values:
                facts[label] = form.format(median=statistics.median(values), most=max(values))
        for label, key in (("AR", "val_ar_loss"), ("diffusion", "val_diffusion_loss")):
            measured = [record for record in run.metrics.validations if record[key] is not None]
            if measured:
                facts[f"{label} validation loss"] = f"{measured[-1][key]:.4f} after step {measured[-1]['step']:,}"
    return facts


def _differences(subjects: Sequence[Subject]) -> Table:
    runs = [subject.run for subject in subjects]
    keys = [key for key in (*differing_keys(runs), "run.seed") if len({str(r.settings.get(key)) for r in runs}) > 1]
    lines = [[key, *(str(run.settings.get(key, "")) for run in runs)] for key in keys]
    return Table(["", *(subject.name for subject in subjects)], lines)


def _losses(subject: Subject, prefix: str) -> str:
    with _blaming_metrics(subject):
        return _svg(curves.draw_run(subject.run.metrics), f"{prefix}-losses")


def _buckets(subject: Subject, prefix: str) -> str:
    with _blaming_metrics(subject):
        figure = curves.draw_buckets(subject.run.metrics)
        return "" if figure is None else _svg(figure, f"{prefix}-buckets")


def _speed(subject: Subject, prefix: str) -> str:
    with _blaming_metrics(subject):
        return _svg(curves.draw_speed(subject.run.metrics, subject.resumed_after), f"{prefix}-speed")


def _usage(subject: Subject, prefix: str) -> str:
    with _blaming_metrics(subject):
        figure = curves.draw_usage(subject.run.metrics)
        return "" if figure is None else _svg(figure, f"{prefix}-usage")


def _starts(subject: Subject, prefix: str) -> str:
    lines = [[time, "from the beginning" if step == 0 else f"after step {step:,}"] for time, step in subject.starts]
    return _html_table(Table(["started", "where"], lines)) if lines else ""


def _samples(subject: Subject, prefix: str) -> str:
    return "".join(
        f"<p><b>{sample.mode}</b>, {escape(sample.figures)}</p><pre>{escape(sample.text)}</pre>"
        for sample in subject.samples
    )


def _evaluation(subject: Subject, suite: str, prefix: str) -> str:
    """Figures and tables of a suite; empty where it was not measured."""
    if suite not in subject.evaluations:
        return ""
    from nld_train.evaluation import plots  # torch comes with it

    with _blaming(
        subject.run.folder / "evaluation" / f"{suite}.json",
        "a result of this version's scripts/evaluate.py",
        "evaluate again, or remove the file",
    ):
        file = subject.evaluations[suite]
        about = f"{file['model']}, {file['num_parameters']:,} parameters, {file['dtype']} on {file['device']}"
        result = from_json(file["result"])
        figures = [_svg(figure, f"{prefix}-{name}") for name, figure in plots.figures(suite, result).items()]
        tables = [_html_table(table) for table in tables_of(suite, result)]
    return f'<p class="quiet">{escape(about)}</p>' + "".join([*figures, *tables])


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>"


def _side_by_side(heading: str, cells: Sequence[str], subjects: Sequence[Subject]) -> str:
    """A column for each run; nothing where no run has anything to show."""
    if not any(cells):
        return ""
    if len(cells) == 1:
        return _section(heading, f'<div class="one">{cells[0]}</div>')
    columns = "".join(
        f"<div><h3>{escape(subject.name)}</h3>{cell or _NOTHING}</div>"
        for subject, cell in zip(subjects, cells, strict=True)
    )
    widths = f"grid-template-columns: repeat({len(cells)}, minmax(32rem, 1fr))"
    return _section(heading, f'<div class="runs" style="{widths}">{columns}</div>')


_LONG_TABLE = 20
"""Lines beyond which a table is shown on demand."""
_NOTHING = '<p class="quiet">nothing on file</p>'


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    rows = [row(table.header, "th"), *(row(line, "td") for line in table.lines)]
    caption = f"<p>{escape(table.caption)}</p>" if table.caption else ""
    text = f'{caption}<div class="table"><table>{"".join(rows)}</table></div>'
    if len(table.lines) <= _LONG_TABLE:
        return text
    return f"<details><summary>{len(table.lines)} rows: {escape(', '.join(table.header[1:]))}</summary>{text}</details>"


def _svg(figure: "Figure", name: str) -> str:
    """The figure as an element of the page, closed; ``name`` keeps its ids apart from those of other figures."""
    import matplotlib
    from matplotlib import pyplot

    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": ["sans-serif"]}):
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    pyplot.close(figure)
    drawing = stream.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", drawing)
    return re.sub("|".join(_COLORS), lambda match: _COLORS[match.group()], drawing)
