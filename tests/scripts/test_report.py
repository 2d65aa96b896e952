"""``scripts/report.py``: what the page shows, that it needs nothing from elsewhere, a real browser, damaged folders."""

import json
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml

from nld_train.evaluation.page import build_page
from nld_train.testing.jobs import ROOT, importing_project
from nld_train.training.metrics import Lap, encode_record, step_record, validation_record
from scripts import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STEPS, TOKENS = {"ar": 40, "joint": 60}, 4096
LOG = """2026-11-21 09:00:00  run        runs/a starts
2026-11-21 09:00:01  stage ar (AR): steps 1..40
2026-11-21 09:05:00  step 30/100 (ar)  loss 5.0  AR 5.0  diffusion -  lr 1e-3  2k tokens/s
2026-11-21 10:00:00  run        runs/a resumes after step 30 of 100
2026-11-21 10:30:00  [ar] 8 tokens, 8 forwards, 1.00 tokens per forward
2026-11-21 10:30:00  an older sample
2026-11-21 10:31:00  [ar] 8 tokens, 8 forwards, 1.00 tokens per forward
2026-11-21 10:31:00  def f(x):
2026-11-21 10:31:00      return x < 1 & "</pre><script>"
2026-11-21 10:32:00  [linear] 8 tokens, 6 forwards, 1.33 tokens per forward
2026-11-21 10:32:00  def g
2026-11-21 10:33:00  run finished: step 100 of 100 after 1:33:00
"""


def write_run(folder, *, seed=1, lr=1e-3, scale=1.0):
    folder.mkdir(parents=True)
    stages = {
        name: {"diffusion_loss_weight": 0.3 * (name == "joint"), "tokens": count * TOKENS, "lr": lr}
        for name, count in STEPS.items()
    }
    config = {
        "run": {"dir": str(folder), "seed": seed},
        "model": {"num_layers": 2, "hidden_size": 32, "vocab_size": 512},
        "data": {"sequence_length": 512},
        "train": {"global_batch_size": 8},
        "stages": stages,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    draw, step, lines = random.Random(seed), 0, []
    for stage, num_steps in STEPS.items():
        for _ in range(num_steps):
            step += 1
            ar_loss, is_joint = scale * 8.3 * step**-0.18, stage == "joint"
            means = {"loss": ar_loss, "ar_loss": ar_loss, "diffusion_loss": 6.0 + draw.random() if is_joint else None}
            if is_joint:
                means |= {f"diffusion_loss_at_{share}": 5 + share / 100 for share in range(10, 101, 10)}
                means |= {f"diffusion_accuracy_at_{share}": 0.5 - share / 300 for share in range(10, 101, 10)}
            lap = Lap(0.1, 4e4 * draw.random(), 0.01)
            where = {"step": step, "stage": stage, "tokens": TOKENS * step}
            usage = {"mfu": 0.4 + 0.02 * draw.random(), "host_memory_gb": 1.5, "device_memory_gb": 50 + step / 50}
            faults = {"is_spike": step in (55, 70), "is_skipped": step == 63}
            record = step_record(**where, means=means, lr=lr, grad_norm=1.0, lap=lap, usage=usage, faults=faults)
            lines.append(record)
            if step % 20 == 0:
                lines.append(validation_record(**where, means={"ar_loss": ar_loss, "diffusion_loss": 7.0}))
    (folder / "metrics.jsonl").write_bytes(b"".join(map(encode_record, lines)))
    (folder / "train.log").write_text(LOG)
    return folder


def write_evaluations(folder):
    about = {"model": "runs/a/hf", "num_parameters": 5_000_000, "device": "cpu", "dtype": "float32"}
    part = {
        "nats_per_token": 4.5, "bits_per_token": 6.5, "nats_per_byte": 1.4, "bits_per_byte": 2.0,
        "error_over_texts": float("nan"), "error_of_estimate": 0.01,
    }  # fmt: skip
    bucket = {"low": 0.9, "high": 1.0, "nats_per_masked_token": 6.25, "num_masked": 1234}
    way = {
        "category": "all", "num_prompts": 4, "num_tokens": 64, "num_forwards": 32, "tokens_per_forward": 2.0,
        "tokens_per_second": 50.0, "acceptance": 2.5, "agreement": 0.75, "equals_ar": 0.5, "ar_nats_per_token": 1.25,
        "histogram": {"1": 3, "4": 5},
    }  # fmt: skip
    ways = [
        {**way, "way": "ar", "mode": "ar", "arguments": {}},
        {**way, "way": "diffusion, threshold 0.9", "mode": "diffusion", "arguments": {"threshold": 0.9}},
        {**way, "way": "linear", "mode": "linear", "arguments": {}},
        {**way, "way": "quadratic", "mode": "quadratic", "arguments": {}},
    ]
    limit = {
        "num_blocks": 8, "num_steps": 10, "acceptance": 3.2, "tokens_per_forward": 1.6, "target_share": 1.0,
        "violations_per_block": 0.5, "num_exhausted": 0,
    }  # fmt: skip
    results = {
        "likelihood": {
            "num_sources": 1, "num_texts": 2, "num_tokens": 99, "num_bytes": 301, "num_sweeps": 2, "seed": 1,
            "ar": part, "diffusion": [{**part, "block_size": 8, "buckets": [bucket]}],
        },
        "decoding": ways,
        "speed_of_light": [{**limit, "block_length": 4, "sampler": name} for name in ("serial", "compaction")],
        "harness": {"linear": {"hellaswag": {"acc,none": 0.25}}},
    }  # fmt: skip
    (folder / "evaluation").mkdir(exist_ok=True)
    for suite, result in results.items():
        (folder / "evaluation" / f"{suite}.json").write_text(json.dumps({**about, "result": result}))


_FETCHED = ("src", "href", "xlink:href", "srcset", "data", "poster", "action", "background")


class Page(HTMLParser):
    """What an HTML parser sees: tags with attributes, the text inside each kind of tag, ids and what points to them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self._open = [], {}, []
        self.feed(text)
        self.ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)

    def external_references(self):
        """Everything that a browser would fetch, or run."""
        found = [f"<{tag}>" for tag, _ in self.tags if tag in ("script", "link", "iframe", "object", "embed", "base")]
        for tag, attributes in self.tags:
            for name, value in attributes.items():
                if name.startswith("on"):
                    found.append(f"{tag} {name}")
                if name in _FETCHED and not value.startswith("#"):
                    found.append(f"{tag} {name}={value}")
                found += [f"{tag} {name}: {url}" for url in re.findall(r"url\(([^)]*)\)", value) if url[0] != "#"]
        styles = "".join(self.texts.get("style", []))
        return found + re.findall(r"@import.*|url\([^#].*", styles)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """The page of two runs, the first with everything in its folder."""
    folder = tmp_path_factory.mktemp("runs")
    first, second = write_run(folder / "a"), write_run(folder / "b", seed=2, lr=2e-3, scale=0.9)
    write_evaluations(first)
    (second / "train.log").unlink()
    heartbeat = {"state": "stalled", "restarts": 3, "world_size": 4, "message": "no step for 600 s", "time": 1.8e9}
    (second / "heartbeat.json").write_text(json.dumps(heartbeat))
    out = folder / "out" / "page.html"
    assert report.main([str(first), str(second), "--out", str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    return out


def test_what_is_shown(two_runs):
    page = Page(two_runs.read_text())
    assert page.texts["title"] == ["Report: a, b"]
    assert page.texts["h2"] == [
        "Overview", "Settings that differ", "Validation losses", "Losses by stage", "Loss by masked share", "Speed",
        "Utilisation and memory", "Starts", "Samples", "Evaluation: likelihood", "Evaluation: decoding",
        "Evaluation: speed of light", "Evaluation: harness",
    ]  # fmt: skip
    # Validations of both, four figures of each, four of the first one's evaluations.
    assert page.count("svg") == 1 + 2 * 4 + 4
    drawn = [text.strip() for text in page.texts["text"]]
    for text in (
        "stage ar",
        "stage joint",
        "AR, validation",
        "masked share",
        "clean tokens per second",
        "MFU (% of the peak)",
        "memory of rank 0 (GiB)",
        "device, the most so far",
        "block length",
    ):
        assert text in drawn, text
    assert drawn.count("stage ar") == 6  # in the losses, the speed and the utilisation of each
    assert (drawn.count("loss spikes"), drawn.count("steps skipped")) == (2, 2)
    cells = page.texts["td"]
    rows = dict(zip(cells[::3], cells[1::3], strict=False))
    assert rows["clean tokens"] == "409,600 of 409,600"
    assert (rows["state"], rows["restarts"]) == ("finished", "1")
    assert (rows["loss spikes"], rows["steps skipped"]) == ("2, the last is step 70", "1, the last is step 63")
    assert re.fullmatch(r"4[01]\.\d% \(median\)", rows["MFU"])
    assert rows["device memory"] == "52.0 GiB at most (rank 0)"
    assert rows["host memory"] == "1.5 GiB at most (rank 0)"
    assert cells[cells.index("state") + 2] == "stalled: no step for 600 s"
    assert cells[cells.index("restarts") + 2] == "3"
    assert cells[cells.index("stages.ar.lr") + 1 :][:2] == ["0.001", "0.002"]
    assert cells[cells.index("run.seed") + 1 :][:2] == ["1", "2"]
    assert "stages.ar.tokens" not in cells  # it does not differ
    assert cells[cells.index("2026-11-21 10:00:00") + 1] == "after step 30"
    # The last sample of each mode, as it was written.
    assert page.texts["pre"] == ['def f(x):\n    return x < 1 & "</pre><script>"', "def g"]
    for text in ("4.5000", "6.2500", "75%", "3.200", "0.2500"):
        assert text in cells, text


def test_the_page_needs_nothing_else(two_runs):
    text = two_runs.read_text()
    page = Page(text)
    assert page.external_references() == []
    assert len(set(page.ids)) == len(page.ids)
    pointed = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text)
    assert pointed
    assert {a or b for a, b in pointed} <= set(page.ids)
    # The check itself finds what it is for.
    for bad in ('<img src="https://x.org/a.png">', "<script>1</script>", '<p style="background: url(a.png)">'):
        assert Page(text.replace("</h1>", f"</h1>{bad}")).external_references() != []


def browse(path, profile):
    """(the document as the browser built it, what it complained about)."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--no-first-run", "--proxy-server=127.0.0.1:9", f"--user-data-dir={profile}",
        "--enable-logging=stderr", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no browser: chromium is not installed")
def test_a_browser_opens_it(two_runs, tmp_path):
    document, complaints = browse(two_runs, tmp_path / "profile")
    assert complaints == []
    page = Page(document)
    assert page.texts["title"] == ["Report: a, b"]
    assert page.count("svg") == 13
    curves = [attributes for tag, attributes in page.tags if tag == "path" and "var(--ar)" in attributes["style"]]
    assert len(curves) >= 4
    assert all(attributes["d"].startswith("M ") for attributes in curves)
    # Whatever came from elsewhere would be complained about.
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(two_runs.read_text().replace("</h1>", '</h1><img src="https://example.org/a.png">'))
    _, complaints = browse(spoilt, tmp_path / "profile")
    assert any("Content Security Policy" in line for line in complaints)


def test_a_run_under_way_needs_little(tmp_path, capsys):
    """One record of an older version, no validation, no log: the page goes beside them."""
    run = write_run(tmp_path / "run")
    (run / "train.log").unlink()
    records = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    newer = ("mfu", "host_memory_gb", "device_memory_gb", "is_spike", "is_skipped")
    record = {name: value for name, value in json.loads(records[0]).items() if name not in newer}
    (run / "metrics.jsonl").write_bytes(encode_record(record) + records[1][:20])
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = Page((run / "report.html").read_text())
    assert page.texts["h2"] == ["Overview", "Losses by stage", "Speed"]
    assert "not finished" in page.texts["td"]


def remove(name):
    return lambda run: (run / name).unlink()


def write(name, text):
    def change(run):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(text)

    return change


def edit(name, key, value, record=None):
    """Give ``key`` (dotted) another value, or take it away (None); of a JSON Lines file in the record of a number."""

    def change(run):
        path = run / name
        path.parent.mkdir(exist_ok=True)
        if path.parent.name == "evaluation":
            write_evaluations(run)
        lines = path.read_text().splitlines()
        text = path.read_text() if record is None else lines[record]
        tree = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        *parents, last = key.split(".")
        inner = tree
        for parent in parents:
            inner = inner[parent]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
        if record is not None:
            lines[record] = json.dumps(tree)
        path.write_text(json.dumps(tree) if record is None else "\n".join(lines) + "\n")

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"config\.yaml: does not exist: .*run is not a folder"),
        (remove("config.yaml"), r"config\.yaml: does not exist"),
        (write("config.yaml", "stages: [\n"), r"config\.yaml: is not a run's configuration"),
        (write("config.yaml", "some: text\n"), r"config\.yaml: is not a run's configuration"),
        (remove("metrics.jsonl"), r"metrics\.jsonl: does not exist"),
        (write("metrics.jsonl", ""), r"metrics\.jsonl: holds no record yet"),
        (write("metrics.jsonl", '{"step": 1, "val_ar_loss": 2}\n'), r"metrics\.jsonl: holds no step record yet"),
        (write("metrics.jsonl", '{"step": 1, "stage": "ar"}\n'), r"metrics\.jsonl: a record of step 1 has no tokens"),
        (write("metrics.jsonl", 'x\n{"step": 1}\n'), r"metrics\.jsonl:1: is not a metrics record"),
        (write("heartbeat.json", "{"), r"heartbeat\.json: is not JSON"),
        (edit("metrics.jsonl", "tokens", "4096", 0), r"metrics\.jsonl: step 1: stage 'ar', tokens '4096'"),
        (edit("metrics.jsonl", "stage", 3, 0), r"metrics\.jsonl: step 1: stage 3, "),
        (edit("metrics.jsonl", "tokens_per_second", None, 3), r"metrics\.jsonl: .*KeyError: 'tokens_per_second'"),
        (edit("metrics.jsonl", "ar_loss", "much", 3), r"metrics\.jsonl: is not a run's metrics .*ValueError"),
        (
            edit("metrics.jsonl", "diffusion_loss_at_50", "much", 60),
            r"metrics\.jsonl: is not a run's metrics .*ValueError",
        ),
        (edit("metrics.jsonl", "step_seconds", "long", 3), r"metrics\.jsonl: is not a run's metrics .*ValueError"),
        (edit("metrics.jsonl", "mfu", "high", 3), r"metrics\.jsonl: is not a run's metrics .*Error"),
        (edit("config.yaml", "stages.ar.tokens", None), r"config\.yaml: is not a run's configuration: .*ar\.tokens"),
        (edit("config.yaml", "stages.ar.tokens", "all"), r"config\.yaml: is not a run's configuration: .*'all'"),
        (edit("config.yaml", "run.seed", "x"), r"config\.yaml: is not a run's configuration: .*'x'"),
        (edit("config.yaml", "model", None), r"config\.yaml: is not a run's configuration .*'model\.num_layers'"),
        (write("heartbeat.json", '{"time": 1e20}'), r"heartbeat\.json: is not a run's heartbeat .*Error"),
        (write("heartbeat.json", '{"time": NaN}'), r"heartbeat\.json: is not a run's heartbeat .*ValueError"),
        (write("heartbeat.json", "[]"), r"heartbeat\.json: holds list"),
        (write("evaluation/decoding.json", "no"), r"decoding\.json: is not JSON"),
        (write("evaluation/decoding.json", "{}"), r"decoding\.json: is not a result .*KeyError: 'model'"),
        (
            edit("evaluation/likelihood.json", "result.ar.nats_per_token", 0),
            r"likelihood\.json: is not a result .*ZeroDivisionError",
        ),
        (write("evaluation/harness.json", "3"), r"harness\.json: holds int"),
    ],
)
def test_damaged_folders(tmp_path, capsys, damage, message):
    run = write_run(tmp_path / "run")
    damage(run)
    assert report.main([str(run), "--out", str(tmp_path / "page.html")]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith("error: ")
    assert "remedy: " in error
    assert not (tmp_path / "page.html").exists()


def test_refusals(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert report.main([str(run), str(run)]) == 1
    assert "run: is named twice" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert report.main([str(run), "--out", str(tmp_path / "file" / "page.html")]) == 1
    assert "page.html: cannot be written: " in capsys.readouterr().err


def test_names_tell_runs_apart(tmp_path):
    runs = [write_run(tmp_path / sweep / "seed1") for sweep in ("x", "y")]
    assert Page(build_page(runs)).texts["title"] == ["Report: x/seed1, y/seed1"]


def test_no_torch(tmp_path):
    """Whoever only looks at curves does not wait for it."""
    code = "import sys; from scripts import report; code = report.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; sys.exit(code)", str(write_run(tmp_path / "run"))],
        capture_output=True, text=True, cwd=ROOT, env=importing_project(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
