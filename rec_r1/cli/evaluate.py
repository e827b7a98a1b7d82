"""The verbs that measure: eval, baseline, transfer, rescore, similarity-gap, tuning-grid, audit and ability."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rec_r1.cli.verbs import OVERRIDES, RECIPE, Verbs, takes_recipe, write_negatives, writes_negatives

TITLE = "evaluate"


def add(verbs: Verbs) -> None:
    text = "evaluate a run on held-out queries, beside raw query and untrained policy"
    p = verbs.add("eval", _eval, text, "eval runs/quickstart")
    p.add_argument("run", type=Path, help="the folder of a run")
    p.add_argument("--split", choices=("test", "validation", "train"), default="test", help="which queries (test)")
    p.add_argument("--metrics", help="comma-separated, added to the recipe's, such as mrr@10,hit@1")
    p.add_argument("--samples", type=int, default=1, help="beside the greedy completions, the mean of so many a query")
    p.add_argument("--against", type=Path, action="append", default=[], help="another run to compare with; repeatable")

    text = "evaluate a baseline on the same held-out queries"
    p = verbs.add("baseline", _baseline, text, "baseline quickstart popularity")
    p.add_argument("recipe", help=RECIPE)
    names = "all, raw, last_title, popularity, random, rm3, untrained, few_shot, best_of, endpoint, sft, dpo, rloo, …"
    p.add_argument("name", help=names)
    p.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDES)
    p.add_argument("--split", choices=("test", "validation"), default="test", help="which queries (test)")
    p.add_argument("--seeds", type=int, help="for so many trained seeds, and compare over all of them")

    text = "evaluate a run's completions with other retrievers"
    p = verbs.add("transfer", _transfer, text, "transfer runs/a --on bm25 --on dense")
    p.add_argument("runs", nargs="+", type=Path, help="folders of evaluated runs of one task")
    p.add_argument("--on", action="append", required=True, help='a retriever: bm25, or "dense {model: NAME}"; repeat')
    p.add_argument("--split", choices=("test", "validation", "train"), default="test", help="which queries (test)")
    p.add_argument("--metric", help="such as ndcg@10 (default: the first run's first)")

    text = "score a run's recorded rollouts under other rewards or another retriever"
    p = verbs.add("rescore", _rescore, text, "rescore runs/quickstart --rewards '{ndcg@1000: 1}'")
    p.add_argument("run", type=Path, help="the folder of a run")
    p.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="of the retriever: retriever.params.k1=0.9"
    )
    p.add_argument("--rewards", required=True, help="as in a recipe: '{ndcg@100: 1, length: 0.5}'")
    p.add_argument("--retriever", metavar="KIND", help="another retriever, such as dense (default: the recorded ranks)")
    p.add_argument("--out", type=Path, help="also write the numbers into this file, as JSON")

    text = "measure what ranking by similar texts misses, and which systems find it"
    p = verbs.add("similarity-gap", _similarity_gap, text, "similarity-gap cpu/sequential task.path=FOLDER")
    takes_recipe(p)
    p.add_argument("--on", action="append", default=[], help='systems in place of the usual: "ease {top: 500}"; repeat')
    p.add_argument("--encoder", action="append", default=[], help="text encoders in place of the usual; repeat")
    p.add_argument("-o", "--output", type=Path, help="the folder of page and numbers (default: in output_dir)")
    p.add_argument("--split", choices=("test", "validation"), default="test", help="which queries (test)")
    p.add_argument("--seeds", type=int, default=3, help="fits of each system with random numbers, for the claims (3)")
    text = "a folder in BEIR's format, for what a tuned encoder forgets (emoji search)"
    p.add_argument("--general", type=Path, metavar="FOLDER", help=text)
    p.add_argument("--quick", action="store_true", help="one fit of each, and no tuned encoder")

    text = "measure under which losses and negatives pre-training helps a tuned encoder"
    p = verbs.add("tuning-grid", _tuning_grid, text, "tuning-grid cpu/sequential task.path=FOLDER retriever.kind=dense")
    takes_recipe(p)
    p.add_argument("-o", "--output", type=Path, help="the folder for the page and its numbers (default: in output_dir)")
    p.add_argument("--split", choices=("test", "validation"), default="test", help="which queries (test)")
    p.add_argument("--seeds", type=int, default=3, help="fits of each encoder, loss and kind of negatives (3)")
    text = "a learning rate to choose from; may be repeated (5e-5 and 5e-4)"
    p.add_argument("--learning-rate", type=float, action="append", default=[], help=text)
    writes_negatives(p)

    text = "score adversaries beside a run's policies: copies, stuffed queries, titles"
    p = verbs.add("audit", _audit, text, "audit runs/quickstart")
    p.add_argument("run", type=Path, help="the folder of a run")
    p.add_argument(
        "--split", choices=("validation", "test", "train"), default="validation", help="which queries (validation)"
    )
    p.add_argument("--queries", type=int, help="the first so many queries (default: all)")
    p.add_argument("--retriever", help='where the gain must last: "dense {model: NAME}" (default: another bm25)')

    text = "measure general ability before and after training, by lm_eval"
    p = verbs.add("ability", _ability, text, "ability runs/a --tasks hellaswag")
    p.add_argument("run", type=Path, help="the folder of a run")
    p.add_argument("--tasks", required=True, help="comma-separated names of lm_eval's tasks")
    p.add_argument("--limit", type=int, help="the first so many examples of each (default: all)")
    p.add_argument("--include", type=Path, help="a folder with lm_eval task files of your own")


def _eval(args: argparse.Namespace) -> int:
    from rec_r1.evaluation.evaluate import evaluate
    from rec_r1.evaluation.tables import closing
    from rec_r1.pages import cards

    metrics = args.metrics.split(",") if args.metrics else []
    result = evaluate(args.run, args.split, metrics, args.samples, args.against)
    if args.split == "test":
        cards.write_evaluated(args.run)
    print(closing(result, args.split))
    for sampled in result["sampled"]:
        if sampled["samples"] == args.samples:
            print(f"\n{args.samples} samples a query, compared among themselves:\n\n{closing(sampled, args.split)}")
    folder = args.run / "evaluation" / args.split
    print(f"\n{result['policy']} of {args.run}; completions, run files and qrels in {folder}")
    return 0


def _baseline(args: argparse.Namespace) -> int:
    from rec_r1 import baselines, config
    from rec_r1.evaluation import seeds
    from rec_r1.evaluation.tables import closing
    from rec_r1.train import train
    from rec_r1.training.seeds import recipes

    recipe = config.load(args.recipe, args.overrides)
    folder = Path(recipe.output_dir)
    each = [recipe] if args.seeds is None else recipes(recipe, args.seeds)
    if args.seeds is not None:
        seeds.evaluated(folder, args.split)  # A mistake must be reported before the baselines are made.
    failed: list[str] = []
    for one in each:
        if args.name == "all":
            result, problems = baselines.run_all(one, args.split, train)
            failed += problems
        else:
            result = baselines.run(one, args.name, args.split, train)
    if args.seeds is not None:
        table = seeds.text(seeds.measure(folder, args.split))
        print(f"\n{table}\n\nthe runs and {seeds.RECORD} are in {folder}")
    elif result:
        print(closing(result, args.split))
        print(f"\ncompletions, run files and qrels in {folder / 'evaluation' / args.split}")
    config.refuse(failed)
    return 0


def _transfer(args: argparse.Namespace) -> int:
    from rec_r1.evaluation import records, transfer, transfer_text
    from rec_r1.pages import transfer_page

    result = transfer.matrix(args.runs, args.on, args.split, args.metric)
    pages = transfer_page.write(result, records.folder_of(args.runs[0], args.split))
    print(transfer_text.text(result), f"\npage: {pages[0]}", sep="\n")
    return 0


def _rescore(args: argparse.Namespace) -> int:
    from rec_r1.checks import rescore, rescore_text
    from rec_r1.evaluation.records import check_writable
    from rec_r1.runs import write_atomically

    if args.out:
        check_writable(args.out.parent, "--out")
    result = rescore.rescore(args.run, args.rewards, args.retriever, args.overrides)
    print(rescore_text.text(result))
    if args.out:
        write_atomically(args.out, json.dumps(result, indent=1, ensure_ascii=False))
        print(f"numbers: {args.out}")
    return 0


def _audit(args: argparse.Namespace) -> int:
    from rec_r1.evaluation import audit, audit_text

    result = audit.audit(args.run, args.split, args.queries, args.retriever)
    print(f"{audit_text.text(result)}\n\nall numbers in {args.run / 'evaluation' / 'audit.json'}")
    return 0


def _similarity_gap(args: argparse.Namespace) -> int:
    from rec_r1 import config
    from rec_r1.similarity_gap import measure, page
    from rec_r1.similarity_gap.systems import ENCODERS

    if args.quick and args.general:
        raise config.UserError("--general: --quick tunes no encoder, which could forget: leave one of them out")
    recipe = config.load(args.recipe, args.overrides)
    folder = args.output or Path(recipe.output_dir) / page.NAME
    page.prepare(folder)
    seeds = 1 if args.quick else args.seeds
    systems = args.on, args.encoder or ENCODERS
    result = measure.measure(recipe, args.split, *systems, seeds, not args.quick, args.general)
    paths = page.write(result, folder)
    said = [f"{row['key']}: {row['sentence']}" for row in result["claims"]["rows"]]
    print(result["gap"]["sentence"], *said, *paths, sep="\n")
    return 0


def _tuning_grid(args: argparse.Namespace) -> int:
    from rec_r1 import config
    from rec_r1.similarity_gap import grid_page, page, tuning_grid

    recipe = config.load(args.recipe, args.overrides)
    folder = args.output or Path(recipe.output_dir) / grid_page.NAME
    page.prepare(folder, grid_page.NAME)
    rates = args.learning_rate or tuning_grid.LEARNING_RATES
    tuning_grid.check(recipe, args.seeds, rates)
    write_negatives(recipe, args, range(args.seeds))
    result = tuning_grid.measure(recipe, args.split, args.seeds, rates)
    print(result["answer"], *result["anti_affinity"]["sentences"], *grid_page.write(result, folder), sep="\n")
    return 0


def _ability(args: argparse.Namespace) -> int:
    from rec_r1.evaluation import ability

    result = ability.measure(args.run, args.tasks.split(","), args.limit, args.include)
    print(f"{ability.text(result)}\n\nall results in {args.run / 'evaluation' / 'ability.json'}")
    return 0
