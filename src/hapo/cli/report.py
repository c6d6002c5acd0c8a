"""`hapo report`: one HTML page of one or several runs, and its figures as files."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from ..insight.finding import counted
from . import UsageError

DESCRIPTION = """Write one HTML page of one or several runs, which works offline: curves of training, overlaid;
what the method did to which tokens; and every recorded token under a microscope."""


def main(argv: list[str]) -> int:
    """Write the page, and with --png the figures; return the exit code."""
    options = _parser().parse_args(argv)
    output = options.output
    if output is None:
        output = options.runs[0] / "report.html" if len(options.runs) == 1 else Path("report.html")
    for folder in options.runs:
        if not (folder / "config.yaml").is_file():
            raise UsageError(f"{folder} is no run folder: it has no config.yaml")
    if output.suffix != ".html" or not output.parent.is_dir() or output.is_dir():
        raise UsageError(f"--output must be an .html file in a folder that exists, got {output}")
    if options.prompts is not None and options.rollouts is None:
        raise UsageError("--prompts are numbers in a rollout batch: name it with --rollouts STEP")
    from ..insight.report import write_figures, write_report  # takes seconds
    from ..insight.run import Run, of_runs
    from ..outputs import check_page

    console = Console(highlight=False, markup=False)
    check_page(output, of_runs(map(Run, options.runs)), options.replace)  # before the figures are written
    files: list[Path] = []
    if options.png is not None:
        files = write_figures(options.runs, options.png, options.format, replace=options.replace)
    page = write_report(
        options.runs,
        output,
        against=options.against,
        rollouts=options.rollouts,
        prompts=options.prompts,
        replace=options.replace,
    )
    console.print(f"report: {page}", soft_wrap=True)
    if options.png is not None:
        console.print(f"{counted(len(files), 'figure')}: {options.png}", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hapo report", description=DESCRIPTION)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    add("--output", type=Path, help="the page; RUN/report.html, of several runs report.html, unless told")
    add(
        "--replace",
        action="store_true",
        help="write over files that are there; a page or figures of the same runs need no such word, unless they "
        "were changed",
    )
    add("--png", type=Path, metavar="FOLDER", help="write each figure here too, without a title, for a paper")
    add("--format", choices=("png", "svg"), default="png", help="of the files that --png writes (png, 300 dpi)")
    add(
        "--against",
        nargs="+",
        default=(),
        metavar="METHOD",
        help="show the same tokens under other methods: NAME or NAME:option=value,...",
    )
    add(
        "--rollouts",
        nargs="+",
        type=int,
        metavar="STEP",
        help="rollout batches in the microscope, by their first step; as many as fit unless told",
    )
    add(
        "--prompts",
        nargs="+",
        type=int,
        metavar="NUMBER",
        help="prompts of these rollout batches in the microscope, as the page numbers them; all unless told",
    )
    return parser
