"""Write what a model is tuned on into a folder, and run the process that tunes it.

The fit has a process of its own, because sentence-transformers' trainer would otherwise share settings with the
training of a policy in the same process: accelerate has one precision and one group of processes for each process. The
memory of the optimizer is free again when the process ends.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.index_folder import damaged, new_folder
from retrievers.encoders.model import Model
from retrievers.encoders.sentence import Encoder
from retrievers.encoders.text_embeddings import embed
from retrievers.interactions import Interactions, Judgments
from retrievers.text.exact_search import Exact
from retrievers.text.tuning import negatives, source_probe, written
from retrievers.text.tuning.job_folder import ENCODER, ERROR
from retrievers.text.tuning.pairs import Pairs, from_interactions, from_judgments
from retrievers.text.tuning.settings import Tuned, TunedCross
from retrievers.types import Retriever, RetrieverError

logger = logging.getLogger(__name__)
Data = Interactions | Judgments
OpenOther = Callable[[str, Mapping[str, Any]], Retriever]
# The variables of a launcher begin so. With them, the trainer would wait for the other processes of the training.
LAUNCHERS = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "DEEPSPEED_", "PMI_", "OMPI_", "SLURM_")
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR",
            "MASTER_PORT")  # fmt: skip


def data_of(
    tuned: Tuned | TunedCross, catalog: Catalog, interactions: Interactions | None, judgments: Judgments | None
) -> Data:
    """What the model is tuned on.

    Raises ValueError where it is not there, belongs to another catalogue, or lacks the histories of anti_affinity.
    """
    there: dict[str, Data | None] = {"interactions": interactions, "judgments": judgments}
    found = {name: data for name, data in there.items() if data is not None and tuned.on in (None, name)}
    if not found:
        what = tuned.on or "interactions or judgments"
        raise ValueError(f"retriever.params.tuned: the model is tuned on {what}, but there are none: give a task "
                         "that has them, or leave tuned out")  # fmt: skip
    if len(found) > 1:
        raise ValueError("retriever.params.tuned.on: there are interactions and judgments: choose one of them")
    (data,) = found.values()
    if data.documents != len(catalog):
        raise ValueError(
            f"{next(iter(found))} with {data.documents} documents for a catalogue of {len(catalog)}: give those of "
            "this catalogue"
        )
    if isinstance(tuned, Tuned) and tuned.anti_affinity and not isinstance(data, Interactions):
        raise ValueError(
            f"retriever.params.tuned.anti_affinity: {tuned.anti_affinity} needs histories, and judgments have none: "
            "set 0, or hard"
        )
    return data


def name_of(data: Data) -> str:
    """The name of what an encoder is tuned on: interactions or judgments."""
    return "interactions" if isinstance(data, Interactions) else "judgments"


def tune(
    folder: Path,
    identity: str,
    catalog: Catalog,
    encoder: Encoder,
    tuned: Tuned,
    data: Data,
    open_other: OpenOther | None,
) -> dict[str, Any]:
    """Tune an encoder, or continue an interrupted fit.

    folder: the folder of the job. Its folder `encoder` then holds the tuned encoder.
    identity: a hash of everything that the fit depends on. The content of ``folder`` with another one is removed.
    catalog: the documents.
    encoder: the encoder that is tuned.
    tuned: how.
    data: on what, see :func:`data_of`.
    open_other: opens the retriever of `affinity`. None = it cannot be opened.

    Returns the report of the fit as plain JSON. Raises ValueError where nothing can be learned from the data, and for a
    wrong parameter that only the fit shows, and RetrieverError where the process ends without a result.
    """

    def write(temporary: Path) -> None:
        pairs = pairs_of(tuned, data, catalog)
        announce(encoder.model, tuned, data, pairs, _negatives_in_words(tuned), folder)
        _write(temporary, folder.parent, identity, catalog, encoder, tuned, data, pairs, open_other)

    return completed(folder, identity, encoder.model, write)


def completed(folder: Path, identity: str, model: Model, write: Callable[[Path], None]) -> dict[str, Any]:
    """Write a job where there is none yet, run its process until it ends, and return the report.

    folder, identity: see :func:`tune`.
    model: the model that is tuned.
    write: writes the files of the job into a folder.

    Raises the errors of :func:`tune`.
    """
    try:
        found = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        same = found["identity"] == identity and bool(found["kind"])  # Jobs of an earlier version have no kind.
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if same:
        logger.info("continuing the fit of %s in %s", model.settings["model"], folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        with new_folder(folder) as temporary:
            write(temporary)
    _run(folder, model.settings["device"])
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    about = json.loads((folder / "job.json").read_text(encoding="utf-8")).get("written")
    return report if about is None else {**report, "written": about}


def check_model(folder: Path, model: Model, data: str, fit: Mapping[str, Any]) -> None:
    """Raises RetrieverError where the tuned model of an index is not the one that was written.

    folder: the folder of the index.
    model: the model in its folder `encoder`.
    data: the fingerprint of what it was tuned on.
    fit: the entry "fit" of index.json, with the hash of the model's files.
    """
    there = (folder / ENCODER).is_dir() and model.describe()["files"] == fit.get("files")
    if not there or data not in model.tuned_on():
        raise damaged(folder, ValueError("the tuned encoder is not the one that was written"))


def announce(
    model: Model, tuned: Tuned | TunedCross, data: Data, pairs: Pairs, negatives_in_words: str, folder: Path
) -> None:
    """Log what is about to be tuned, on what, and where."""
    whose = "users" if isinstance(data, Interactions) else "queries"
    logger.info(
        "tuning %s on %s of %d %s: %d epochs of %d pairs, negatives: %s; in a process of its own, in %s",
        model.settings["model"], name_of(data), len(data), whose, tuned.epochs, len(pairs) // tuned.epochs,
        negatives_in_words, folder,
    )  # fmt: skip


def _negatives_in_words(tuned: Tuned) -> str:
    more = {
        "text neighbours": tuned.hard,
        "items of negative affinity": tuned.anti_affinity,
        "written texts": tuned.written,
    }
    found = [f"{count} {name}" for name, count in more.items() if count]
    return " and ".join(["those of the batch", *found])


def pairs_of(tuned: Tuned | TunedCross, data: Data, catalog: Catalog) -> Pairs:
    """The pairs of all epochs. Raises ValueError where there are fewer than two in an epoch."""
    how = tuned.epochs, tuned.positives, tuned.seed, tuned.pairs if isinstance(tuned, TunedCross) else None
    pairs = (
        from_interactions(data, catalog.titles, *how) if isinstance(data, Interactions) else from_judgments(data, *how)
    )
    if len(pairs) < 2 * tuned.epochs:
        raise ValueError(
            f"retriever.params.tuned: an epoch has {len(pairs) // tuned.epochs} pairs of a query and a relevant "
            "document, and needs at least two: give more training data, or leave tuned out"
        )
    return pairs


def _write(
    folder: Path,
    siblings: Path,
    identity: str,
    catalog: Catalog,
    encoder: Encoder,
    tuned: Tuned,
    data: Data,
    pairs: Pairs,
    open_other: OpenOther | None,
) -> None:
    """Write the job that `train.py` reads. siblings: the folder with other indexes, whose embeddings are used again."""
    rows, texts, about = _negatives(folder, siblings, catalog, encoder, tuned, pairs, open_other)
    lists = {"left_out": pairs.held_out.left_out, "relevant": pairs.held_out.rows}
    write_files(folder, identity, catalog, encoder.model, tuned, data, pairs, rows, lists, texts, about)


def write_files(
    folder: Path,
    identity: str,
    catalog: Catalog,
    model: Model,
    tuned: Tuned | TunedCross,
    data: Data,
    pairs: Pairs,
    all_negatives: np.ndarray,
    lists: Mapping[str, Sequence[Sequence[int]]],
    written_texts: Sequence[str] = (),
    about_written: Mapping[str, Any] | None = None,
) -> None:
    """Write the files that :class:`retrievers.text.tuning.job_folder.Job` reads.

    model: the model that is tuned.
    all_negatives: (X, m) int64 rows of the negatives of each pair; -1 = there is none.
    lists: name -> a list of rows for each query of the validation split.
    written_texts: the texts whose rows follow those of the catalogue.
    about_written: what the report says about them.
    """
    catalog.save(folder / "catalog")
    arrays: dict[str, Any] = {"query": pairs.query, "row": pairs.row, "group": pairs.group, "negatives": all_negatives}
    arrays |= {"known": pairs.known, "known_offsets": pairs.offsets}
    for name, own in lists.items():
        arrays[name], arrays[f"{name}_offsets"] = _list(own)
    np.savez(folder / "pairs.npz", **arrays)
    texts = {"queries": list(pairs.texts), "held_out": list(pairs.held_out.texts), "written": list(written_texts)}
    (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    job = {
        "identity": identity,
        "kind": "encoder" if isinstance(tuned, Tuned) else "cross-encoder",
        "on": name_of(data),
        "model": str(model.folder),
        # The process has one GPU, whose number there is 0.
        "encoder": model.settings | {"device": "cuda" if _gpu(model.settings["device"]) else model.settings["device"]},
        "tuned": asdict(tuned),
        "tuned_on": [data.fingerprint, *model.tuned_on()],
        "written": about_written,
    }
    (folder / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")


def _negatives(
    folder: Path,
    siblings: Path,
    catalog: Catalog,
    encoder: Encoder,
    tuned: Tuned,
    pairs: Pairs,
    open_other: OpenOther | None,
) -> tuple[np.ndarray, Sequence[str], dict[str, Any] | None]:
    """The rows of the further negatives, (X, m) int64; the written texts, whose rows follow those of the catalogue; and
    what the report says about these. With `keep`, the frozen embeddings are written into ``folder``."""
    found: list[np.ndarray] = [np.zeros((len(pairs), 0), np.int64)]
    texts: Sequence[str] = ()
    about = None
    if tuned.hard or tuned.keep:
        documents = embed(catalog, encoder, siblings)
        queries = encoder.queries(pairs.texts)
        if tuned.hard:
            exact = Exact(documents, encoder.settings["device"])
            found.append(negatives.text_neighbours(pairs, queries, exact, tuned.hard, tuned.seed))
    if tuned.anti_affinity:
        against = _affinity(tuned, open_other)
        found.append(negatives.anti_affinity(pairs, against, len(catalog), tuned.anti_affinity, tuned.seed))
    if tuned.written:
        texts, rows, about = _written(tuned, pairs, catalog, encoder)
        found.append(rows)
    if tuned.keep:
        np.save(folder / "frozen_documents.npy", np.concatenate([documents, encoder.documents(texts)]))
        np.save(folder / "frozen_queries.npy", queries)
    return np.concatenate(found, axis=1), texts, about


def _written(
    tuned: Tuned, pairs: Pairs, catalog: Catalog, encoder: Encoder
) -> tuple[Sequence[str], np.ndarray, dict[str, Any]]:
    """The written negatives: the texts, their rows after those of the catalogue, (X, m) int64, and what the report says
    about them. Raises ValueError where the file has no text for these pairs."""
    file = Path(tuned.written_file or "")
    found = written.of_pairs(pairs, written.read(file), catalog.ids, catalog.texts, tuned.written, tuned.seed)
    counts = dict(found.counts)
    if not found.texts:
        raise ValueError(
            f"{written.PARAMETER}: {file} has no usable text for the {counts['pairs']} pairs that the encoder is tuned "
            f"on ({counts['other_pairs']} are for other pairs): write them with `{written.HOW_TO_WRITE}`"
        )
    groups = source_probe.groups_of(pairs, found.numbers, tuned.seed)
    texts = [found.texts[number] for number in groups[:, 1].tolist()]
    documents = [catalog.texts[row] for row in pairs.row[groups[:, 0]].tolist()]
    probed = source_probe.probe(encoder.documents(texts), encoder.documents(documents), tuned.seed)
    logger.info("written negatives: %s", ", ".join(f"{name} {count}" for name, count in counts.items()))
    near = probed["low"] is not None and probed["low"] > source_probe.NEAR_ONE
    logger.log(logging.WARNING if near else logging.INFO, "%s", source_probe.sentence(probed))
    rows = np.where(found.numbers < 0, -1, found.numbers + len(catalog))
    return found.texts, rows, {**counts, "probe": probed, "says": source_probe.sentence(probed)}


def _list(lists: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of rows as one array and its offsets, as `Job.listed` reads them."""
    offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in lists])]).astype(np.int64)
    return np.array([row for rows in lists for row in rows], np.int64), offsets


def _affinity(tuned: Tuned, open_other: OpenOther | None) -> Retriever:
    """The retriever that knows what speaks against a history. Raises ValueError where it does not open."""
    kind, params = tuned.affinity["kind"], tuned.affinity.get("params") or {}
    if open_other is None:
        raise ValueError("retriever.params.tuned.anti_affinity: open `dense` by retrievers.open, which opens the other")
    try:
        return open_other(kind, params)
    except (ValueError, TypeError) as error:
        raise ValueError(f"retriever.params.tuned.affinity: {error}") from error


def _run(folder: Path, device: str | None) -> None:
    """Run `train.py` on a folder until it ends. Raises ValueError and RetrieverError where there is no result."""
    command = [sys.executable, "-m", "retrievers.text.tuning.train", str(folder)]
    code = subprocess.run(command, env=_environment(device), stdin=subprocess.DEVNULL, check=False).returncode
    if (folder / "report.json").is_file() and code == 0:
        return
    if code == 2 and (folder / ERROR).is_file():
        raise ValueError((folder / ERROR).read_text(encoding="utf-8"))
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    memory = (
        ", which is often a lack of memory: lower tuned.batch_size, or set tuned.mini_batch of an encoder"
        if code == -9
        else ""
    )
    raise RetrieverError(
        f"the fit ended with {how}{memory} (its messages are above): start it again, and it continues from "
        f"the last checkpoint in {folder}"
    )


def _environment(device: str | None) -> dict[str, str]:
    """The environment of the process: without a launcher, offline, and with at most one GPU."""
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHED and not k.startswith(LAUNCHERS)}
    package = str(Path(__file__).parents[3])
    env["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [env.get("PYTHONPATH")])])
    env["HF_HUB_OFFLINE"] = "1"  # All files are on this machine. A model card would ask the hub about the base model.
    env["TOKENIZERS_PARALLELISM"] = env.get("TOKENIZERS_PARALLELISM", "false")
    number = int((device or "").partition(":")[2] or 0) if device is None or _gpu(device) else 0
    # With several GPUs, the trainer would divide each batch among them. An empty variable hides them all.
    visible = env["CUDA_VISIBLE_DEVICES"].split(",") if "CUDA_VISIBLE_DEVICES" in env else []
    env["CUDA_VISIBLE_DEVICES"] = visible[number] if number < len(visible) else str(number)
    return env


def _gpu(device: str | None) -> bool:
    return device is not None and device.startswith("cuda")
