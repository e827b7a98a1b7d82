"""The command `rec-r1`. Each verb imports what it needs: `rec-r1 recipes` starts without torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rec_r1 import console

RECIPE = "a YAML file, or the name of a shipped recipe"
OVERRIDES = "change a setting: retriever.params.k1=0.9"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns 0; 2 for a user's mistake (one line on stderr); 130 when interrupted; 141 where nobody
    reads on, as in `rec-r1 recipes | head -1`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:  # the very program that `accelerate launch -m rec_r1.train` runs
        from rec_r1.train import main as train

        return train(argv[1:])
    parser = _parser()
    args, extra = parser.parse_known_args(argv or ["--help"])
    if extra and hasattr(args, "queries") and not any(word.startswith("--") for word in extra):
        args.queries += extra
    elif extra:  # argparse gives up on key=value after an option
        if not hasattr(args, "overrides") or any(word.startswith("-") or "=" not in word for word in extra):
            parser.error(f"unrecognized arguments: {' '.join(extra)}")
        args.overrides += extra
    console.setup()
    verb: Callable[[argparse.Namespace], int] = args.verb

    def run() -> int:
        code = verb(args)
        sys.stdout.flush()
        return code

    try:
        return console.guard(run)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rec-r1",
        description="Fine-tune a language model by GRPO on the metric of a retriever's ranking.",
        epilog="example: rec-r1 check quickstart && rec-r1 train quickstart",
    )
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    verbs.add_parser("train", help="train a policy (rec-r1 train --help)")

    def add(name: str, verb: Callable[[argparse.Namespace], int], text: str, example: str) -> argparse.ArgumentParser:
        p = verbs.add_parser(name, help=text, description=f"{text}.", epilog=f"example: rec-r1 {example}")
        p.set_defaults(verb=verb)
        return p

    def of_recipe(p: argparse.ArgumentParser) -> None:
        p.add_argument("recipe", help=RECIPE)
        p.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)

    p = add(
        "check",
        _check,
        "test a recipe without training: data, judgments, lengths, memory",
        "check recipes/quickstart.yaml",
    )
    of_recipe(p)

    p = add("try", _try, "play the policy: type completions, see what they earn", "try quickstart --query lecturer")
    of_recipe(p)
    p.add_argument("--query", help="a query of the task (default: one after the other of the validation split)")
    p.add_argument("--hits", type=int, default=10, help="hits to show (10)")

    p = add("prepare", _prepare, "read a task's raw files into the cache, once", "prepare esci_bm25 task.path=FOLDER")
    of_recipe(p)

    p = add("index", _index, "build the index that a recipe needs", "index recipes/quickstart.yaml")
    of_recipe(p)

    p = add("fit", _fit, "fit a history backend on a task's interactions", "fit propagate task.path=FOLDER")
    of_recipe(p)

    p = add("serve", _serve, "serve a recipe's retriever to many trainers", "serve recipes/quickstart.yaml --port 8077")
    of_recipe(p)
    p.add_argument("--host", default="127.0.0.1", help="address to bind (127.0.0.1; others need $REC_R1_TOKEN)")
    p.add_argument("--port", type=int, default=8077, help="port (8077)")
    p.add_argument("--wait-ms", type=float, default=2.0, help="how long requests are collected for one call (2)")

    p.add_argument("--policy", action="store_true", help="serve the policy of a run, whose folder is given as recipe")
    p.add_argument("--timeout", type=float, default=5.0, help="--policy: seconds until the raw query is sent (5)")
    _endpoint_options(p)

    p = add("ask", _ask, "ask a run's policy: what it writes, and what is found", "ask runs/quickstart lecturer --k 5")
    p.add_argument("run", type=Path, help="the folder of a run")
    p.add_argument("queries", nargs="*", metavar="QUERY", help="queries; none, or -, reads them from stdin")
    p.add_argument("--history", action="append", default=[], metavar="ID,ID", help="ids of a query's history; repeat")
    p.add_argument("--file", type=Path, help="queries: one a line, or JSONL or CSV with query and history")
    p.add_argument("--k", type=int, default=10, help="hits to show (10)")
    p.add_argument("--json", action="store_true", help="print JSONL")
    p.add_argument("-o", "--output", type=Path, help="write JSONL into this file")
    p.add_argument("--untrained", action="store_true", help="ask the policy as it was before training")
    _endpoint_options(p)

    p = add("export", _export, "merged weights for transformers, vLLM and Ollama", "export runs/quickstart --gguf")
    p.add_argument("run", type=Path, help="the folder of an evaluated run")
    p.add_argument("--folder", type=Path, help="write the files here (default: RUN/merged)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(float32)")
    p.add_argument("--gguf", action="store_true", help="also a GGUF file and a Modelfile for Ollama")
    p.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py (default: the one on PATH)")

    p = add("eval", _eval, "greedy held-out evaluation beside raw query and untrained policy", "eval runs/quickstart")
    p.add_argument("run", type=Path, help="the folder of a run")
    p.add_argument("--split", choices=("test", "validation", "train"), default="test", help="which queries (test)")
    p.add_argument("--metrics", help="comma-separated, added to the recipe's, such as mrr@10,hit@1")
    p.add_argument("--samples", type=int, default=1, help="beside the greedy answers, the mean of so many a query")
    p.add_argument("--against", type=Path, action="append", default=[], help="another run to compare with; repeatable")

    p = add("baseline", _baseline, "what a policy must beat, in the same harness", "baseline quickstart popularity")
    p.add_argument("recipe", help=RECIPE)
    p.add_argument("name", help="raw, last_title, popularity, random, rm3, untrained, few_shot, endpoint, sft, dpo, …")
    p.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    p.add_argument("--split", choices=("test", "validation"), default="test", help="which queries (test)")

    p = add("transfer", _transfer, "a run's answers sent to other retrievers", "transfer runs/a --on bm25 --on dense")
    p.add_argument("runs", nargs="+", type=Path, help="folders of evaluated runs of one task")
    p.add_argument("--on", action="append", required=True, help='a retriever: bm25, or "dense {model: NAME}"; repeat')
    p.add_argument("--split", choices=("test", "validation", "train"), default="test", help="which queries (test)")
    p.add_argument("--metric", help="such as ndcg@10 (default: the first run's first)")

    p = add(
        "similarity-gap", _similarity_gap, "what ranking by similar texts misses, and which systems find it",
        "similarity-gap cpu/sequential task.path=FOLDER",
    )  # fmt: skip
    of_recipe(p)
    p.add_argument("--on", action="append", default=[], help='systems in place of the usual: "ease {top: 500}"; repeat')
    p.add_argument("--encoder", action="append", default=[], help="text encoders in place of the usual; repeat")
    p.add_argument("-o", "--output", type=Path, help="the folder of page and numbers (default: in output_dir)")
    p.add_argument("--split", choices=("test", "validation"), default="test", help="which queries (test)")

    p = add("ability", _ability, "general ability before and after, by lm_eval", "ability runs/a --tasks hellaswag")
    p.add_argument("run", type=Path, help="the folder of a run")
    p.add_argument("--tasks", required=True, help="comma-separated names of lm_eval's tasks")
    p.add_argument("--limit", type=int, help="the first so many examples of each (default: all)")
    p.add_argument("--include", type=Path, help="a folder with lm_eval task files of your own")

    p = add("push", _push, "the best policy with a model card, to the hub", "push runs/a me/my-policy")
    p.add_argument("run", type=Path, help="the folder of an evaluated run")
    p.add_argument("repository", help="OWNER/NAME on the hub")
    p.add_argument("--private", action="store_true", help="make the repository private")
    p.add_argument("--folder", type=Path, help="write the files here (default: RUN/export)")
    p.add_argument("--dry-run", action="store_true", help="write the files, upload nothing")

    p = add("report", _report, "one page of one or several runs: curves, tables, rewrites", "report runs/a runs/b")
    p.add_argument("runs", nargs="+", type=Path, help="folders of runs, or of baselines")
    p.add_argument("-o", "--output", type=Path, help="the HTML file (default: report.html in the first run)")
    p.add_argument("--split", choices=("test", "validation", "train"), default="test", help="which queries (test)")

    p = add("plot", _plot, "reward curves of one or several runs in one PNG", "plot runs/a runs/b -o curves.png")
    p.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    p.add_argument("-o", "--output", type=Path, help="the PNG (default: reward_curve.png in the first run)")

    add("recipes", _recipes, "list the recipes that come with the toolkit", "recipes")
    return parser


def _endpoint_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server that holds the weights, up to /v1")
    p.add_argument("--model", metavar="NAME", help="with --endpoint: the name of the weights there")


def _check(args: argparse.Namespace) -> int:
    from rec_r1 import config
    from rec_r1.checks import check

    recipe = config.load(args.recipe, args.overrides)
    for line in check.check(recipe):
        print(line, flush=True)
    return 0


def _try(args: argparse.Namespace) -> int:
    from rec_r1 import config
    from rec_r1.checks import check

    return check.play(config.load(args.recipe, args.overrides), args.query, args.hits)


def _prepare(args: argparse.Namespace) -> int:
    from rec_r1 import config, tasks
    from rec_r1.tasks.task_cache import description

    print(*description(tasks.load(config.load(args.recipe, args.overrides).task)), sep="\n")
    return 0


def _index(args: argparse.Namespace) -> int:
    from rec_r1 import config
    from rec_r1.environment import build_index

    print(*build_index(config.load(args.recipe, args.overrides)), sep="\n")
    return 0


def _fit(args: argparse.Namespace) -> int:
    from rec_r1 import config
    from rec_r1.environment import fit

    print(*fit(config.load(args.recipe, args.overrides)), sep="\n")
    return 0


def _serve(args: argparse.Namespace) -> int:
    from rec_r1 import config
    from rec_r1.environment import serve

    def load() -> config.Recipe:
        return config.load(args.recipe, args.overrides)

    if args.policy:
        from rec_r1.policy import service

        service.serve(Path(args.recipe), args.overrides, args.host, args.port, args.wait_ms, args.timeout,
                      args.endpoint, args.model)  # fmt: skip
    else:
        serve(load, args.host, args.port, args.wait_ms)
    return 0


def _ask(args: argparse.Namespace) -> int:
    from rec_r1.policy import ask
    from rec_r1.runs import write_atomically

    ask.check(args.k, args.output)
    asked = ask.questions(args.queries, args.history, args.file, sys.stdin)
    answers = ask.ask(ask.open_policy(args.run, not args.untrained, args.endpoint, args.model), asked, args.k)
    if args.output:
        write_atomically(args.output, ask.jsonl(answers))
        print(f"{len(answers)} answers in {args.output}")
    else:
        print(ask.jsonl(answers) if args.json else ask.table(answers), end="" if args.json else "\n")
    return 0


def _export(args: argparse.Namespace) -> int:
    from rec_r1.policy import export

    folder = args.folder or args.run / "merged"
    print(*export.export(args.run, folder, args.dtype, args.gguf, args.converter), sep="\n")
    return 0


def _eval(args: argparse.Namespace) -> int:
    from rec_r1.evaluation.evaluate import evaluate
    from rec_r1.evaluation.tables import closing

    metrics = args.metrics.split(",") if args.metrics else []
    result = evaluate(args.run, args.split, metrics, args.samples, args.against)
    print(closing(result, args.split))
    for sampled in result["sampled"]:
        if sampled["samples"] == args.samples:
            print(f"\n{args.samples} samples a query, compared among themselves:\n\n{closing(sampled, args.split)}")
    print(f"\n{result['policy']} of {args.run}; answers, run files and qrels in {args.run / 'evaluation' / args.split}")
    return 0


def _baseline(args: argparse.Namespace) -> int:
    from rec_r1 import baselines, config
    from rec_r1.evaluation.tables import closing

    recipe = config.load(args.recipe, args.overrides)
    print(closing(baselines.run(recipe, args.name, args.split), args.split))
    print(f"\nanswers, run files and qrels in {Path(recipe.output_dir) / 'evaluation' / args.split}")
    return 0


def _transfer(args: argparse.Namespace) -> int:
    from rec_r1.evaluation import transfer

    print(transfer.text(transfer.matrix(args.runs, args.on, args.split, args.metric)))
    return 0


def _similarity_gap(args: argparse.Namespace) -> int:
    from rec_r1 import config
    from rec_r1.similarity_gap import measure, page
    from rec_r1.similarity_gap.systems import ENCODERS

    recipe = config.load(args.recipe, args.overrides)
    folder = args.output or Path(recipe.output_dir) / page.NAME
    page.prepare(folder)
    result = measure.measure(recipe, args.split, args.on, args.encoder or ENCODERS)
    paths = page.write(result, folder)
    print(result["gap"]["sentence"], *paths, sep="\n")
    return 0


def _ability(args: argparse.Namespace) -> int:
    from rec_r1.evaluation import ability

    result = ability.measure(args.run, args.tasks.split(","), args.limit, args.include)
    print(f"{ability.text(result)}\n\nall of it in {args.run / 'evaluation' / 'ability.json'}")
    return 0


def _push(args: argparse.Namespace) -> int:
    from rec_r1.pages import hub

    folder = hub.export(args.run, args.folder or args.run / "export")
    print(f"policy and card in {folder}")
    if not args.dry_run:
        print(hub.push(folder, args.repository, args.private))
    return 0


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


def _recipes(args: argparse.Namespace) -> int:
    from rec_r1.config import find, shipped

    for name in shipped():
        purpose = find(name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(f"{name:<26} {purpose}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
