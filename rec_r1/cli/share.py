"""The verbs that show a run to others: report, plot and push."""

from __future__ import annotations

import argparse
from pathlib import Path

from rec_r1.cli.verbs import Verbs

TITLE = "show and share"


def add(verbs: Verbs) -> None:
    text = "write a page about one or several runs: curves, tables, rewrites"
    p = verbs.add("report", _report, text, "report runs/a runs/b")
    p.add_argument("runs", nargs="+", type=Path, help="folders of runs, or of baselines")
    p.add_argument("-o", "--output", type=Path, help="the HTML file (default: report.html in the first run)")
    p.add_argument("--split", choices=("test", "validation", "train"), default="test", help="which queries (test)")

    text = "draw the reward curves of one or several runs in one PNG"
    p = verbs.add("plot", _plot, text, "plot runs/a runs/b -o curves.png")
    p.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    p.add_argument("-o", "--output", type=Path, help="the PNG (default: reward_curve.png in the first run)")

    text = "upload the best policy to the hub, with a model card"
    p = verbs.add("push", _push, text, "push runs/a me/my-policy")
    p.add_argument("run", type=Path, help="the folder of an evaluated run")
    p.add_argument("repository", help="OWNER/NAME on the hub")
    p.add_argument("--private", action="store_true", help="make the repository private")
    p.add_argument("--folder", type=Path, help="write the files here (default: RUN/export)")
    p.add_argument("--dry-run", action="store_true", help="write the files, upload nothing")


def _report(args: argparse.Namespace) -> int:
    from rec_r1.pages import run_report

    print(*run_report.write(args.runs, args.output or args.runs[0] / "report.html", args.split), sep="\n")
    return 0


def _plot(args: argparse.Namespace) -> int:
    from rec_r1.pages import outputs, plots

    output = args.output or args.runs[0] / "reward_curve.png"
    outputs.check_file(output, ".png")
    plots.draw(args.runs, output)
    print(output)
    return 0


def _push(args: argparse.Namespace) -> int:
    from rec_r1.pages import hub

    folder = hub.export(args.run, args.folder or args.run / "export")
    print(f"policy and card in {folder}")
    if not args.dry_run:
        print(hub.push(folder, args.repository, args.private))
    return 0
