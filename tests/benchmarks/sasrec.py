"""Compares SASRec with that of RecBole 1.2.1, on the same split of MovieLens-100k.

    python tests/benchmarks/sasrec.py --ml100k FOLDER
    python tests/benchmarks/sasrec.py --ml100k FOLDER --latest 20 --max-history 20 --batch 256

The last item of each user is the test target, and the one before is the validation target; both systems get the same
sequences and the same targets. Rankings are of the whole catalogue without the history, and both systems are scored by
the same function.

*ours* is the backend `sasrec`, which predicts after every item of a window in one pass. *recbole* is RecBole's model
class with RecBole's examples: each prefix of a training sequence, cut to its latest items and padded to --max-history,
is an example of its own; --batch shuffled examples are a batch; Adam. The loop around it is ours, so that both get the
same sequences and stop by the same rule: when ndcg@10 on validation has not risen for --patience epochs, the best epoch
is kept. Sizes, dropout, learning rate and loss (cross-entropy over all items) are the same. An epoch of either has each
example once.

*s/epoch* is the processor time of a fit divided by its epochs, each with the validation after it. The first lines
of output compare both networks with the same weights: their scores, and their losses in a few steps of Adam.

RecBole needs packages that it imports and this project does not use: `pip install --no-deps recbole==1.2.1 tensorboard
colorlog==4.7.2 colorama==0.4.4 thop texttable tabulate`. With --results FILE, finished fits are kept in a file and are
not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import retrievers
from retrievers import Catalog, Interactions, Query
from retrievers.core.ranking import rank
from retrievers.recommenders.next_item import Windows, ndcg_at_10, seeded
from retrievers.recommenders.sasrec import Params, SASRec, softmax_loss
from retrievers.recommenders.transformer import encode

FIGURES = ("ndcg@10", "recall@10", "epochs", "s/epoch")
DROPOUT, LEARNING_RATE = 0.5, 1e-3  # RecBole's defaults.
STEPS, USERS_OF_STEPS = 20, 8  # Of the comparison of losses.


class Split(NamedTuple):
    """The items, the interactions of the training and validation splits, and the test queries with their targets."""

    catalog: Catalog
    interactions: Interactions
    queries: list[Query]
    targets: np.ndarray


def ml100k(folder: Path, users: int | None, latest: int | None) -> Split:
    """The leave-one-out split, of the first users and of their latest choices. None = of all."""
    with (folder / "ml-100k.inter").open(encoding="utf-8") as file:
        next(file)
        events = [line.split("\t") for line in file]
    items = sorted({event[1] for event in events}, key=int)
    rows = {item: row for row, item in enumerate(items)}
    sequences: dict[str, list[int]] = {}
    for user, item, _, _ in sorted(events, key=lambda event: float(event[3])):
        sequences.setdefault(user, []).append(rows[item])
    own = [sequence[-latest:] if latest else sequence for sequence in list(sequences.values())[:users]]
    catalog = Catalog.from_records({"id": item, "text": item} for item in items)
    validation = [tuple(s[:-2]) for s in own], [s[-2] for s in own]
    given = Interactions.from_sequences(len(items), [s[:-2] for s in own], validation)
    return Split(catalog, given, [Query(history=tuple(s[:-1])) for s in own], np.array([s[-1] for s in own]))


def figures(model: Any, split: Split) -> dict[str, float]:
    """ndcg@10 and recall@10 of a model on the test queries."""
    places = []
    for start in range(0, len(split.queries), 256):
        part = split.queries[start : start + 256]
        for query, scores, target in zip(part, np.array(model.scores(part)), split.targets[start:], strict=False):
            scores[list(query.history)] = -np.inf
            places.append(int(rank(scores, np.array([target]), -np.inf)[0]))
    ranks = np.array(places)
    found = (ranks > 0) & (ranks <= 10)
    return {"ndcg@10": float((found / np.log2(np.maximum(ranks, 1) + 1.0)).mean()), "recall@10": float(found.mean())}


class RecBole:
    """RecBole's SASRec over the items of the training split, with the `scores` of a recommender.

    settings: the sizes.
    rows: the rows of these items, ascending. Item number i has the id i + 1 there, because 0 is its padding.
    documents: the number of items of the catalogue.
    """

    def __init__(self, settings: Params, rows: np.ndarray, documents: int) -> None:
        from recbole.model.sequential_recommender.sasrec import SASRec as Network

        class Dataset:
            def num(self, field: str) -> int:
                return len(rows) + 1

        config = {
            "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "LIST_SUFFIX": "_list", "NEG_PREFIX": "neg_",
            "ITEM_LIST_LENGTH_FIELD": "length", "MAX_ITEM_LIST_LENGTH": settings.max_history, "device": "cpu",
            "n_layers": settings.layers, "n_heads": settings.heads, "hidden_size": settings.dim,
            "inner_size": settings.inner_dim or 4 * settings.dim, "hidden_dropout_prob": settings.dropout,
            "attn_dropout_prob": settings.dropout, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
            "initializer_range": 0.02, "loss_type": "CE",
        }  # fmt: skip
        self.net = Network(config, Dataset())
        self.rows, self.documents, self.length = rows, documents, settings.max_history
        self.numbers = np.zeros(documents, np.int64)
        self.numbers[rows] = np.arange(1, len(rows) + 1)

    def batch(self, histories: list[np.ndarray]) -> dict[str, torch.Tensor]:
        """The histories as RecBole's model takes them: (B, max_history) ids, padded with 0 at the end, and lengths."""
        cut = [history[-self.length :] for history in histories]
        out = np.zeros((len(cut), self.length), np.int64)
        for b, history in enumerate(cut):
            out[b, : len(history)] = history
        return {"item_list": torch.from_numpy(out), "length": torch.tensor([len(history) for history in cut])}

    def scores(self, queries: list[Query]) -> np.ndarray:
        self.net.eval()
        histories = [self.numbers[list(query.history)] for query in queries]
        with torch.inference_mode():
            found = self.net.full_sort_predict(self.batch([h[h > 0] for h in histories])).numpy()
        out = np.full((len(queries), self.documents), -np.inf, np.float32)
        out[:, self.rows] = found[:, 1:]
        return out


def fit_recbole(settings: Params, split: Split, size: int) -> dict[str, float]:
    """Fit RecBole's model as the docstring of this file says."""
    given = split.interactions
    with seeded(settings.seed):
        model = RecBole(settings, np.unique(given.rows), given.documents)
        sequences = [model.numbers[given.sequence(user)] for user in range(len(given))]
        examples = [(s[:i], s[i]) for s in sequences for i in range(1, len(s))]
        inputs = model.batch([history for history, _ in examples])
        answers = torch.tensor([answer for _, answer in examples])
        optimizer = torch.optim.Adam(model.net.parameters(), lr=settings.learning_rate)
        best, kept, highest = 0, {}, -np.inf
        started = time.process_time()
        for epoch in range(1, settings.epochs + 1):
            model.net.train()
            for rows in torch.randperm(len(answers)).split(size):
                batch = {name: value[rows] for name, value in inputs.items()} | {"item": answers[rows]}
                optimizer.zero_grad()
                model.net.calculate_loss(batch).backward()
                optimizer.step()
            figure = ndcg_at_10(model, given)
            assert figure is not None
            if figure > highest:
                best, highest = epoch, figure
                kept = {name: value.clone() for name, value in model.net.state_dict().items()}
            print(f"  recbole epoch {epoch}: validation ndcg@10 {figure:.4f}, {time.process_time() - started:.0f} s",
                  flush=True)  # fmt: skip
            if epoch - best >= settings.patience:
                break
        seconds = (time.process_time() - started) / epoch
        model.net.load_state_dict(kept)
    return {**figures(model, split), "epochs": best, "s/epoch": seconds, "validation": highest}


def fit_ours(settings: Params, split: Split, size: int) -> dict[str, float]:
    """Fit the backend `sasrec`, whose batches are of windows, so that ``size`` does not matter."""
    own = {name: value for name, value in vars(settings).items() if value != getattr(Params, name)}
    started = time.process_time()
    made: Any = retrievers.open("sasrec", split.catalog, None, split.interactions, **own)
    seconds = (time.process_time() - started) / made.report["ran"]
    found = {"epochs": made.report["epochs"], "s/epoch": seconds, "validation": max(made.report["ndcg@10"])}
    return {**figures(made.model, split), **found}


def pair(settings: Params, split: Split) -> tuple[SASRec, RecBole]:
    """Both networks with the same random weights."""
    rows = np.unique(split.interactions.rows).astype(np.int64)
    with seeded(0):
        ours = SASRec(settings.network(len(rows)), settings.heads, rows, split.interactions.documents)
        theirs = RecBole(settings, rows, split.interactions.documents)
    net, state = ours.net, theirs.net.state_dict()
    state["item_embedding.weight"][1:] = net["content"].weight
    state["position_embedding.weight"] = net["positions"].weight
    names = {
        "multi_head_attention.dense": "out",
        "multi_head_attention.LayerNorm": "norm",
        "feed_forward.dense_1": "up",
        "feed_forward.dense_2": "down",
        "feed_forward.LayerNorm": "norm_after",
    }
    for part in ("weight", "bias"):
        state[f"LayerNorm.{part}"] = getattr(net["norm"], part)
        for number, layer in enumerate(net["layers"]):
            at = f"trm_encoder.layer.{number}"
            for their_name, own_name in names.items():
                state[f"{at}.{their_name}.{part}"] = getattr(layer[own_name], part)
            three = getattr(layer["queries_keys_values"], part).chunk(3)
            for their_name, value in zip(("query", "key", "value"), three, strict=True):
                state[f"{at}.multi_head_attention.{their_name}.{part}"] = value
    theirs.net.load_state_dict(state)
    return ours, theirs


def same_outputs(settings: Params, split: Split) -> float:
    """The largest difference of a score, with the same weights."""
    ours, theirs = pair(settings, split)
    queries = split.queries[:100]
    one, other = ours.scores(queries)[:, ours.rows], theirs.scores(queries)[:, ours.rows]
    return float(np.abs(one - other).max())


def same_steps(settings: Params, split: Split) -> float:
    """The largest difference of a loss in STEPS steps of Adam without dropout, from the same weights.

    Ours reads a whole sequence of up to max_history + 1 items in one pass; RecBole's network reads each of its prefixes
    as an example. RecBole's padding is left out of the softmax here, because its logit is not in ours.
    """
    settings = replace(settings, dropout=0.0)
    ours, theirs = pair(settings, split)
    given = split.interactions
    sequences = [ours.numbers[given.sequence(user)][: settings.max_history + 1] for user in range(USERS_OF_STEPS)]
    (batch,) = Windows(sequences, settings.max_history).batches(USERS_OF_STEPS, np.random.default_rng(0))
    counted = batch.targets >= 0
    examples = [(s[:i] + 1, s[i]) for s in (sequences[user] for user in batch.users) for i in range(1, len(s))]
    inputs, answers = theirs.batch([history for history, _ in examples]), torch.tensor([a for _, a in examples])
    nets = ours.net.train(), theirs.net.train()
    optimizers = [torch.optim.Adam(net.parameters(), lr=settings.learning_rate) for net in nets]
    differences = []
    for _ in range(STEPS):
        vectors = ours.net["content"](torch.from_numpy(batch.inputs))
        outputs = encode(ours.net, vectors, settings.heads)[torch.from_numpy(counted)]
        items = np.arange(len(ours.rows))
        own = softmax_loss(outputs, ours.net["content"].weight, batch.targets[counted], items)
        logits = theirs.net(inputs["item_list"], inputs["length"]) @ theirs.net.item_embedding.weight[1:].T
        other = torch.nn.functional.cross_entropy(logits, answers)
        differences.append(abs(own.item() - other.item()))
        for loss, optimizer in zip((own, other), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return max(differences)


ARMS: dict[str, Callable[[Params, Split, int], dict[str, float]]] = {"ours": fit_ours, "recbole": fit_recbole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ml100k", type=Path, required=True, help="folder with ml-100k.inter")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--users", type=int, help="only the first users")
    parser.add_argument("--latest", type=int, help="only so many of the latest choices of each user")
    parser.add_argument("--max-history", type=int, default=50)
    parser.add_argument("--batch", type=int, default=2048, help="RecBole's examples a step")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--patience", type=int, default=10)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--params", type=json.loads, default={}, help="further parameters of ours, as JSON")
    parser.add_argument("--results", type=Path, help="a file that keeps the fits")
    args = parser.parse_args()
    split = ml100k(args.ml100k, args.users, args.latest)
    given = split.interactions
    same = {"max_history": args.max_history, "dropout": DROPOUT, "learning_rate": LEARNING_RATE}
    common = {**same, "epochs": args.epochs, "patience": args.patience}
    print(f"{len(given)} users, {len(np.unique(given.rows))} items in training, {len(given.rows)} choices, "
          f"{len(split.queries)} test queries; {torch.get_num_threads()} thread(s)", flush=True)  # fmt: skip
    if "recbole" in args.arms:
        difference = same_outputs(Params(**common), split)
        print(f"with the same weights, scores differ by at most {difference:.1e}", flush=True)
        difference = same_steps(Params(**common), split)
        print(f"in {STEPS} steps from the same weights, losses differ by at most {difference:.1e}", flush=True)
    kept = [json.loads(line) for line in args.results.read_text().splitlines()] if _exists(args.results) else []
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in args.arms}
    for seed in args.seeds:
        for arm in args.arms:
            settings = Params(**common, **(args.params if arm == "ours" else {}), seed=seed)
            key = {"arm": arm, "users": args.users, "latest": args.latest, "batch": args.batch, **vars(settings)}
            result = next((each["result"] for each in kept if each["key"] == key), None)
            if result is None:
                result = ARMS[arm](settings, split, args.batch)
                if args.results:
                    with args.results.open("a") as file:
                        file.write(json.dumps({"key": key, "result": result}) + "\n")
            found[arm].append(result)
            print(f"{arm:<8} seed {seed}  {_line([result[name] for name in FIGURES])}", flush=True)
    print(f"\n{'mean':<16}{''.join(f'{name:>18}' for name in FIGURES)}")
    for arm, results in found.items():
        columns = [[result[name] for result in results] for name in FIGURES]
        cells = [f"{statistics.mean(c):.4f} ± {statistics.stdev(c) if len(c) > 1 else 0:.4f}" for c in columns]
        print(f"{arm:<16}{''.join(f'{cell:>18}' for cell in cells)}")
    if len(found) == len(ARMS):
        ours, theirs = ([result["s/epoch"] for result in found[arm]] for arm in ("ours", "recbole"))
        print(f"ours / recbole, s/epoch: {statistics.mean(ours) / statistics.mean(theirs):.2f}")


def _exists(path: Path | None) -> bool:
    return path is not None and path.is_file()


def _line(values: list[float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in zip(FIGURES, values, strict=True))


if __name__ == "__main__":
    main()
