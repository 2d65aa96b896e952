#!/usr/bin/env python
"""Write runs as one HTML page, which opens anywhere without a network.

    python scripts/report.py runs/tiny                       # runs/tiny/report.html
    python scripts/report.py runs/a runs/b --out ab.html     # side by side

Curves of both losses by stage, losses by masked share, speed, starts, continuations of the export's prompt, and what
scripts/evaluate.py left in RUN/evaluation. A run that is under way is shown as far as it is.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nld_train.errors import DataError, NLDError
from nld_train.evaluation.page import build_page


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write the page under its name when it is complete.

    Raises:
        DataError: a folder is no run's or damaged, or ``out`` cannot be written.
    """
    page = build_page(folders)
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise DataError(str(out), f"cannot be written: {error.strerror}", "name another file with --out") from error
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, e.g. runs/tiny")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first run's folder")
    arguments = parser.parse_args(argv)
    try:
        print(write_report(arguments.runs, arguments.out or arguments.runs[0] / "report.html"))
    except NLDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
