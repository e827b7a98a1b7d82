"""The table of backends, and functions that find a backend, list its parameters and open it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from retrievers.catalog import Catalog
from retrievers.core.choices import choose, not_imported
from retrievers.core.parameters import Checks, problems_of
from retrievers.encoders.unsharded import unsharded
from retrievers.interactions import Interactions, Judgments
from retrievers.text.languages import mismatch
from retrievers.types import Retriever

# Kind -> the module of the backend; :class:`BackendModule` says what a module declares. A backend of the user's own is
# named by the path of such a module, or of a class with the same names.
BACKENDS = {
    "bm25": "retrievers.text.bm25",
    "lucene": "retrievers.text.lucene",
    "tantivy": "retrievers.text.tantivy",
    "dense": "retrievers.text.dense",
    "hybrid": "retrievers.combine.hybrid",
    "milvus": "retrievers.text.milvus",
    "opensearch": "retrievers.text.opensearch.backend",
    "elasticsearch": "retrievers.text.opensearch.backend",  # The same: the product is found out.
    "postgres": "retrievers.text.postgres.backend",
    "remote": "retrievers.serving.client",
    "popularity": "retrievers.recommenders.popularity",
    "propagate": "retrievers.combine.propagate",
    "itemknn": "retrievers.recommenders.itemknn",
    "ease": "retrievers.recommenders.ease",
    "l3ae": "retrievers.recommenders.l3ae",
    "sansa": "retrievers.recommenders.sansa",
    "sasrec": "retrievers.recommenders.sasrec",
    "vqrec": "retrievers.recommenders.vqrec.backend",
    "personas": "retrievers.recommenders.personas.backend",
    "late": "retrievers.text.late",
    "rerank": "retrievers.combine.rerank",
}
# The optional functions of a backend's module.
_FUNCTIONS = ("inner_backends", "analysis_language", "fit_data", "content_hash")
_DATA = ("interactions", "judgments")  # What a backend may be fitted on.
_GIVEN = (*_DATA, "inner_folder", "open_other")  # What `open` passes to a `build` that has a parameter of this name.

InnerFolder = Callable[[str, Mapping[str, Any]], Path]  # (kind, params) of an inner backend -> the folder of its index
# (kind, params) -> another backend over the same catalogue, which is fitted on the same data
OpenOther = Callable[[str, Mapping[str, Any]], Retriever]


@dataclass(frozen=True)
class BackendModule:
    """What the module of a backend declares, or a class in a module. ``build`` is required, and every other name may be
    left out. :func:`backend_module` reads these names and no others.

    build: ``build(catalog, folder=None, **params) -> Retriever``. It opens what ``folder`` already holds, and else
        builds it there (None: in memory). A backend that is fitted takes what it is fitted on in parameters named
        ``interactions`` and ``judgments``. A backend that opens others may have a parameter named ``inner_folder``, see
        :func:`open`. One that asks another backend while it is fitted may have a parameter named ``open_other``, a
        function from a kind and its params to that backend over the same catalogue and the same data.
    params: named ``Params`` in the module: a dataclass whose fields are the parameters. Without it, the parameters are
        those of ``build`` after ``folder``.
    index_format: named ``INDEX_FORMAT``: the version of what ``build`` writes, an integer. It is part of the name of a
        cached index, so that a newer version builds its own.
    inner_backends: a function, params -> the {kind, params} mappings of the backends that this one opens. Without it,
        the backend opens no others.
    analysis_language: a function, params -> the code of the language whose words are analysed, or None for words as
        they are written. Without it, the backend analyses no words.
    fit_data: a function, params -> which of "interactions" and "judgments" the index is fitted on; () = the index is
        not fitted. Both names = on whichever of them a task has. Without it, these are all that ``build`` has as
        parameters.
    content_hash: a function, params -> a hash of the files that the index is made of beside the catalogue and the data,
        or None. It is part of the name of a cached index. Without it, there are no such files.
    """

    build: Callable[..., Retriever]
    params: type | None = None
    index_format: int | None = None
    inner_backends: Callable[[Mapping[str, Any]], Sequence[Mapping[str, Any]]] | None = None
    analysis_language: Callable[[Mapping[str, Any]], str | None] | None = None
    fit_data: Callable[[Mapping[str, Any]], Sequence[str]] | None = None
    content_hash: Callable[[Mapping[str, Any]], str | None] | None = None

    @property
    def takes(self) -> list[str]:
        """Which of ``interactions``, ``judgments``, ``inner_folder`` and ``open_other`` are parameters of ``build``."""
        signature = inspect.signature(self.build).parameters
        return [name for name in _GIVEN if name in signature]

    def fitted_on(self, params: Mapping[str, Any]) -> list[str]:
        """Which of "interactions" and "judgments" an index with these parameters is fitted on."""
        wanted = _DATA if self.fit_data is None else self.fit_data(params)
        return [name for name in self.takes if name in _DATA and name in wanted]

    def parameter_names(self) -> list[str] | None:
        """The names of the parameters; None where ``build`` takes any."""
        if self.params is not None:
            return [field.name for field in fields(self.params)]
        signature = list(inspect.signature(self.build).parameters.values())
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature):
            return None
        return [parameter.name for parameter in signature[2:] if parameter.name not in _GIVEN]


def backend_module(kind: str) -> BackendModule:
    """What the module or class that ``kind`` names declares.

    Raises ValueError for an unknown kind, a module without `build`, and a declared name of another type than
    :class:`BackendModule` says.
    """
    found = _find(kind)
    # A user's module is plain Python, and most of the names are optional. They are read here, once, by name; all other
    # code has a BackendModule, whose fields mypy checks.
    given = {name: getattr(found, name, None) for name in ("build", "Params", "INDEX_FORMAT", *_FUNCTIONS)}
    if given["build"] is None:
        raise ValueError(f"retriever.kind: {kind!r} has no function build(catalog, folder, **params): write one")
    for name in ("build", *_FUNCTIONS):
        if given[name] is not None and not callable(given[name]):
            raise ValueError(f"retriever.kind: {name} in {kind!r} must be a function, got {given[name]!r}: rename it")
    if given["Params"] is not None and not (inspect.isclass(given["Params"]) and is_dataclass(given["Params"])):
        raise ValueError(
            f"retriever.kind: Params in {kind!r} must be a dataclass, got {given['Params']!r}: make it one, or rename"
        )
    if given["INDEX_FORMAT"] is not None and type(given["INDEX_FORMAT"]) is not int:
        raise ValueError(
            f"retriever.kind: INDEX_FORMAT in {kind!r} must be an integer, got {given['INDEX_FORMAT']!r}: count from 1"
        )
    functions = {name: given[name] for name in _FUNCTIONS}
    return BackendModule(given["build"], given["Params"], given["INDEX_FORMAT"], **functions)


def open(
    kind: str,
    catalog: Catalog,
    folder: str | Path | None = None,
    interactions: Interactions | None = None,
    inner_folder: InnerFolder | None = None,
    judgments: Judgments | None = None,
    **params: Any,
) -> Retriever:
    """Open ``kind`` over ``catalog`` from ``folder``, and build what is not there yet.

        catalog = retrievers.Catalog.from_records([{"id": "d1", "text": "red shoes"}, {"id": "d2", "text": "hose"}])
        bm25 = retrievers.open("bm25", catalog, "indexes/shop", k1=0.9)    # the second time it is opened, not built
        bm25.search([retrievers.Query("shoes")], k=10).rows                # [[0, -1]]
        bm25.ranks([retrievers.Query("shoes")], [[0, 1]])                  # [[1, 0]]

        choices = retrievers.Interactions.from_sequences(len(catalog), [[0, 1], [1, 0]])
        popular = retrievers.open("popularity", catalog, interactions=choices)

    kind: a name of `retrievers.BACKENDS`, or the path of a module or class of your own, see :class:`BackendModule`.
    catalog: the documents that are ranked.
    folder: the folder of the index. None = the index is built in memory.
    interactions: what a recommender is fitted on. Backends that are not fitted on it do not get it.
    inner_folder: a function that returns the folder of the index of an inner backend, for a backend that opens others
        (`hybrid`, `propagate`). Backends with the same inner one then share its index. An inner index that is inside
        ``folder`` already is opened there. None = all inner indexes are inside ``folder``.
    judgments: the judged queries that a text retriever may be fitted on. Other backends do not get them.
    params: the parameters of the kind.

    Raises ValueError, which names the choices, for an unknown kind or parameter, and RetrieverError for a folder
    that holds something else or something broken.
    """
    backend = _with_parameters(kind, params)

    def open_other(other: str, its_params: Mapping[str, Any]) -> Retriever:
        where = inner_folder(other, its_params) if inner_folder is not None else None
        return open(other, catalog, where, interactions, inner_folder, judgments, **its_params)

    # A backend that opens others passes the data on to them. Any other gets only what its index is fitted on.
    wanted = _DATA if backend.inner_backends is not None else backend.fitted_on(params)
    given: dict[str, Any] = {
        "interactions": interactions if "interactions" in wanted else None,
        "judgments": judgments if "judgments" in wanted else None,
        "inner_folder": inner_folder,
        "open_other": open_other,
    }
    with unsharded():  # The backend may load a model, and the other processes do not load it at the same time.
        return backend.build(catalog, folder, **{name: given[name] for name in backend.takes}, **params)


def index_backends(kind: str, params: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The kind and the parameters of each backend that has an index of its own: ``kind`` itself or, if it opens others,
    those, at any depth. One that opens others and is itself fitted, as a tuned `rerank` is, comes before them.

    Raises ValueError for an unknown kind or parameter.
    """
    backend = _with_parameters(kind, params)
    if backend.inner_backends is None:
        return [(kind, params)]
    own = [(kind, params)] if backend.fit_data is not None and backend.fit_data(params) else []
    inner = backend.inner_backends(params)
    return own + [found for part in inner for found in index_backends(part["kind"], part.get("params") or {})]


def fit_data(kind: str, params: Mapping[str, Any]) -> set[str]:
    """Which of "interactions" and "judgments" the index of ``kind`` is fitted on, or those of the backends that it
    opens. An empty set = it is not fitted.

        retrievers.fit_data("ease", {})                # {"interactions"}
        retrievers.fit_data("dense", {"tuned": {}})    # {"interactions", "judgments"}: on whichever a task has

    Raises ValueError for an unknown kind or parameter.
    """
    found = index_backends(kind, params)
    return {name for inner, given in found for name in backend_module(inner).fitted_on(given)}


def content_hashes(kind: str, params: Mapping[str, Any]) -> list[str]:
    """A hash of the files that the index of ``kind``, or of each backend that it opens, is made of beside the catalogue
    and the data. Most indexes are made of no such files.

    Raises ValueError for an unknown kind or parameter, and for a file that cannot be read.
    """
    found = [(backend_module(inner).content_hash, given) for inner, given in index_backends(kind, params)]
    hashes = [content(given) for content, given in found if content is not None]
    return [each for each in hashes if each is not None]


def takes_interactions(kind: str, params: Mapping[str, Any]) -> bool:
    """Whether :func:`fit_data` names interactions. Raises ValueError for an unknown kind or parameter."""
    return "interactions" in fit_data(kind, params)


def languages(kind: str, params: Mapping[str, Any]) -> list[str | None]:
    """The language code of ``kind``, or of each backend that it opens, that analyses words.

    None in the list stands for words as they are written. The list is empty where nothing analyses words. Raises
    ValueError for an unknown kind or parameter.
    """
    found = [(backend_module(inner).analysis_language, given) for inner, given in index_backends(kind, params)]
    return [language(given) for language, given in found if language is not None]


def mismatches(kind: str, params: Mapping[str, Any], catalog: Catalog) -> list[str]:
    """A sentence for each of :func:`languages` that the script of the texts does not belong to.

    Raises ValueError for an unknown kind or parameter.
    """
    found = [mismatch(catalog.texts, code) for code in dict.fromkeys(languages(kind, params))]
    return [line for line in found if line is not None]


def parameters(kind: str) -> dict[str, Any]:
    """The parameters of ``kind``, name -> annotation. A parameter without an annotation is not listed.

    Raises ValueError for an unknown kind.
    """
    backend = backend_module(kind)
    if backend.params is not None:
        return get_type_hints(backend.params)
    names = backend.parameter_names() or []
    return {name: hint for name, hint in get_type_hints(backend.build).items() if name in names}


def format_of(kind: str) -> int | None:
    """The version of the index that ``kind`` writes; None for a backend without one and for a kind that does not exist.

    It is part of a cached index's name, so that a newer release builds its own index.
    """
    try:
        return backend_module(kind).index_format
    except ValueError:
        return None


def check_parameters(kind: str, params: Mapping[str, Any]) -> None:
    """Check the parameters of a backend, and of the backends that it opens, without a catalogue.

    kind, params: see :func:`open`.

    Raises ValueError for an unknown kind or parameter, and for a value that the backend's `Params` refuses. A backend
    without `Params` checks its values when it is built.
    """
    backend = _with_parameters(kind, params)
    if backend.params is not None:
        backend.params(**params)
    checks = Checks()
    for part in backend.inner_backends(params) if backend.inner_backends is not None else ():
        try:
            check_parameters(part["kind"], part.get("params") or {})
        except ValueError as error:
            checks.found += [f"{line} (of the inner retriever {part['kind']!r})" for line in problems_of(error)]
    checks.raise_all()


def _with_parameters(kind: str, params: Mapping[str, Any]) -> BackendModule:
    """The backend, once ``params`` are known to be its parameters. Raises ValueError, naming the choices, otherwise."""
    backend = backend_module(kind)
    known = backend.parameter_names()
    checks = Checks()
    for name in params:
        with checks:
            if known is not None and name not in known:
                choices = choose(name, known) if known else "it takes none"
                raise ValueError(f"retriever.params.{name}: unknown parameter of {kind!r}: {choices}")
    checks.raise_all()
    return backend


def _find(kind: str) -> Any:
    """The module, or the class in a module, that ``kind`` names."""
    if kind[:1] in ("", ".") or (kind not in BACKENDS and "." not in kind and importlib.util.find_spec(kind) is None):
        choices = choose(kind, BACKENDS)
        raise ValueError(f"retriever.kind: unknown {kind!r}: {choices}, or give the path of a module of yours")
    path = BACKENDS.get(kind, kind)
    try:
        return importlib.import_module(path)
    except Exception as error:  # A user's own module may raise anything.
        # "module.Class" has no module of that name; an import that fails inside the module has another one.
        parent, _, name = path.rpartition(".")
        if parent and getattr(error, "name", None) == path:
            attribute = getattr(importlib.import_module(parent), name, None)
            if attribute is not None:
                return attribute
        raise ValueError(f"retriever.kind: cannot import {kind!r} {not_imported(path, error)}") from error
