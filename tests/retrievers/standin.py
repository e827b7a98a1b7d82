"""A stand-in for an Elasticsearch or OpenSearch cluster, on a real socket: the requests that the backend sends, over
our own `bm25`. The official clients speak to it. It records what it receives, and fails as it is told.

It proves nothing about a real cluster, because it only knows what we know of the two products. With
$REC_R1_OPENSEARCH_URL, the tests that :func:`opened` serves run on a real one.

    python tests/retrievers/standin.py PORT [PRODUCT [FILE]]    # serves until it is killed

FILE is JSON: the id of each document of an index `shop` -> its fields.
"""

from __future__ import annotations

import base64
import functools
import heapq
import json
import os
import re
import sys
import threading
import time
import uuid
from pathlib import Path

import numpy as np
from serving import start
from standin_documents import Documents, EngineError
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import retrievers
from retrievers import Catalog

ROOT = {
    "opensearch": {
        "version": {"distribution": "opensearch", "number": "2.19.1", "lucene_version": "9.12.1"},
        "tagline": "The OpenSearch Project: https://opensearch.org/",
    },
    "elasticsearch": {
        "version": {"number": "8.19.3", "build_flavor": "default", "lucene_version": "9.12.2"},
        "tagline": "You Know, for Search",
    },
}


class Standin:
    """The cluster. ``trouble`` and ``search_trouble`` return an answer in place of the engine's, or None.

    trouble: (method, path) -> a Response.
    search_trouble: the body of a search -> the object of its result.
    jitter: (score, ascending) -> the score as this way of searching computes it. None = the score.
    """

    def __init__(self, product: str = "opensearch", authorization: str | None = None, port: int = 0) -> None:
        self.product, self.authorization = product, authorization
        self.root = ROOT[product]
        self.indexes: dict[str, dict] = {}
        self.aliases: dict[str, set[str]] = {}
        self.pits: dict[str, tuple[Documents, float]] = {}
        self.scrolls: dict[str, list] = {}
        self.received: list[tuple[str, str, list[dict]]] = []
        self.clients: list[int] = []  # The port from which each request came, one for each connection.
        self.trouble = self.search_trouble = lambda *_: None
        self.jitter = None
        self.opened = 0
        self.url, self.stop = start(self.app(), port)

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/{path:path}", self.answer, methods=["GET", "POST", "PUT", "DELETE", "HEAD"])])

    def restart(self) -> None:
        """As after a crash: at the same address, without its points in time."""
        self.pits = {}
        self.url, self.stop = start(self.app(), int(self.url.rpartition(":")[2]))

    def add(self, name: str, sources: dict[str, dict], **settings) -> None:
        """Make an index, as its owner would."""
        documents = Documents(dict(sources), settings)
        self.indexes[name] = {
            "uuid": uuid.uuid4().hex,
            "documents": documents,
            "seq": len(sources) - 1,
            "made": time.time(),
        }

    def write(self, name: str, identifier: str, source: dict | None) -> None:
        """Replace or, with None, delete a document."""
        index = self.indexes[name]
        sources = {one: old for one, old in index["documents"].sources.items() if one != identifier}
        sources |= {} if source is None else {identifier: source}
        index["documents"], index["seq"] = Documents(sources, index["documents"].settings), index["seq"] + 1

    async def answer(self, request) -> Response:
        path, body = "/" + request.path_params["path"], (await request.body()).decode()
        many = request.headers.get("content-type", "").startswith(
            ("application/x-ndjson", "application/vnd.elasticsearch+x-")
        )
        lines = [json.loads(line) for line in (body.split("\n") if many else [body]) if line]
        self.received.append((request.method, path, lines))
        self.clients.append(request.client.port)
        headers = {}
        kind = "application/json"
        if self.product == "elasticsearch":
            headers, kind = (
                {"x-elastic-product": "Elasticsearch"},
                "application/vnd.elasticsearch+json;compatible-with=8",
            )
        if self.authorization is not None and request.headers.get("authorization") != self.authorization:
            return JSONResponse(
                {"error": {"type": "security_exception", "reason": "missing authentication"}}, 401, headers
            )
        played = self.trouble(request.method, path)
        if played is not None:
            return played
        try:
            status, found = 200, self.handle(request.method, path, dict(request.query_params), lines)
        except EngineError as error:
            status, found = error.args[0], error.body
        return Response(json.dumps(found), status, {**headers, "content-type": kind})

    def handle(self, method: str, path: str, params: dict, lines: list[dict]) -> dict:
        first, *rest = path.strip("/").split("/")
        operation = "/".join(rest)
        whole = (method, "/" + first if first.startswith("_") else "", operation)
        body = lines[0] if lines else {}
        match whole:
            case ("GET", "", "") if not first:
                return self.root
            case ("POST", "/_msearch", ""):
                return {"took": 1, "responses": [self.searched(*lines[i : i + 2]) for i in range(0, len(lines), 2)]}
            case ("POST", "/_aliases", ""):
                for action in body["actions"]:
                    names = self.aliases.setdefault(action["add"]["alias"], set())
                    if names and action["add"]["is_write_index"]:
                        raise EngineError(500, "illegal_state_exception", "alias has more than one write index")
                    names.add(action["add"]["index"])
                return {"acknowledged": True}
            case ("GET", "/_alias", alias):
                if not self.aliases.get(alias):
                    raise EngineError(404, "aliases_not_found_exception", f"alias [{alias}] missing")
                return {name: {"aliases": {alias: {}}} for name in self.aliases[alias]}
            case ("DELETE", "/_pit", "") if self.product == "elasticsearch":
                return {"succeeded": True, "num_freed": len([self.pits.pop(body["id"])])}
            case ("DELETE", "/_search", "point_in_time") if self.product == "opensearch":
                return {"pits": [{"successful": bool(self.pits.pop(one)), "pit_id": one} for one in body["pit_id"]]}
            case ("POST", "/_search", "scroll"):
                return self.page(body["scroll_id"])
            case ("DELETE", "/_search", "scroll"):
                return {"succeeded": True, "num_freed": bool(self.scrolls.pop(body["scroll_id"], None))}
        return self.of_index(method, first, operation, params, lines)

    def of_index(self, method: str, name: str, operation: str, params: dict, lines: list[dict]) -> dict:
        body = lines[0] if lines else {}
        if method == "PUT" and not operation:
            if name in self.indexes:
                raise EngineError(400, "resource_already_exists_exception", f"index [{name}] already exists")
            self.add(name, {}, **body["settings"]["index"], properties=body["mappings"]["properties"])
            return {"acknowledged": True, "index": name}
        if method == "GET" and operation == "_settings":
            matching = [one for one in self.indexes if re.fullmatch(name.replace("*", ".*"), one)]
            made = {one: str(int(self.indexes[one]["made"] * 1000)) for one in matching}
            return {one: {"settings": {"index": {"creation_date": made[one]}}} for one in matching}
        if operation == "_field_caps" and name.endswith("*") and not any(map(name[:-1].__eq__, self.indexes)):
            return {"indices": [], "fields": {}}  # A pattern that no index matches is no error.
        index = self.resolved(name)
        documents = index["documents"]
        match method, operation:
            case "DELETE", "":
                self.indexes = {one: other for one, other in self.indexes.items() if other is not index}
                self.aliases = {alias: names - {name} for alias, names in self.aliases.items()}
                return {"acknowledged": True}
            case "PUT", "_settings":
                documents.settings.update(body["index"])
                return {"acknowledged": True}
            case "POST", "_bulk":
                for action, source in zip(lines[::2], lines[1::2], strict=True):
                    documents.sources[action["index"]["_id"]] = source
                    index["seq"] += 1
                return {
                    "errors": False,
                    "items": [{"index": {**action["index"], "status": 201}} for action in lines[::2]],
                }
            case "POST", "_refresh":
                documents.models.clear()
                return {"_shards": {"failed": 0}}
            case "GET", "_count":
                return {"count": len(documents.sources)}
            case "GET", "_stats/docs":
                shard = {"routing": {"primary": True}, "seq_no": {"max_seq_no": index["seq"]}}
                about = {"uuid": index["uuid"], "primaries": {"docs": {"count": len(documents.sources)}}}
                return {"indices": {name: {**about, "shards": {"0": [shard]}}}}
            case "GET", "_field_caps":
                names = dict.fromkeys(key for source in documents.sources.values() for key in source)
                kinds = {key: "keyword" if key in documents.settings.get("keywords", ()) else "text" for key in names}
                for kind in ("nested", "long"):
                    kinds |= dict.fromkeys(documents.settings.get(kind, ()), kind)
                fields = {key: {kind: {"aggregatable": kind in ("keyword", "long")}} for key, kind in kinds.items()}
                return {"indices": [name], "fields": fields}
            case "GET", _ if operation.startswith("_mapping/field/"):
                fields = operation.removeprefix("_mapping/field/").split(",")
                return {name: {"mappings": {field: {"mapping": documents.mapping(field)} for field in fields}}}
            case "POST", "_search" if "scroll" in params:
                found = documents.scores(body["query"])
                hits = [self.hit(documents, one, None, body) for one in documents.sources if one in found]
                self.scrolls["scroll"] = [hits[i : i + body["size"]] for i in range(0, len(hits), body["size"])]
                return {**self.page("scroll"), "hits": {"total": {"value": len(hits)}, "hits": self.last}}
            case "POST", "_search" if "aggs" in body:
                return {"aggregations": documents.counted(body)}
            case "POST", "_pit" if self.product == "elasticsearch":
                return {"id": self.pinned(documents, params["keep_alive"])}
            case "POST", "_search/point_in_time" if self.product == "opensearch":
                return {"pit_id": self.pinned(documents, params["keep_alive"])}
        raise EngineError(400, "illegal_argument_exception", f"no handler found for {method} {name}/{operation}")

    def resolved(self, name: str) -> dict:
        names = self.aliases.get(name) or {name}
        if len(names) > 1 or not names <= self.indexes.keys():
            raise EngineError(404, "index_not_found_exception", f"no such index [{name}]")
        return self.indexes[next(iter(names))]

    def pinned(self, documents: Documents, keep_alive: str) -> str:
        identifier = base64.b64encode(uuid.uuid4().bytes * 4).decode()
        self.opened += 1
        frozen = Documents(dict(documents.sources), documents.settings, documents.models)
        self.pits[identifier] = frozen, seconds(keep_alive)
        return identifier

    def page(self, scroll: str) -> dict:
        pages = self.scrolls[scroll]
        self.last = pages.pop(0) if pages else []
        return {"_scroll_id": scroll, "timed_out": False, "_shards": {"failed": 0}, "hits": {"hits": self.last}}

    def hit(self, documents: Documents, identifier: str, score: float | None, body: dict) -> dict:
        found = {"_index": "i", "_id": identifier, "_score": score}
        values = {key: [documents.sources[identifier][key]] for key in body.get("docvalue_fields", ())}
        return found | ({"fields": values} if values else {})

    def searched(self, header: dict, body: dict) -> dict:
        """The result of one search of an `_msearch`."""
        played = self.search_trouble(body)
        if played is not None:
            return played
        assert "index" not in header and body["_source"] is False
        try:
            documents, _ = self.pits.get(body["pit"]["id"]) or (None, None)
            if documents is None:
                raise EngineError(404, "search_context_missing_exception", "No search context found for id [1]")
            unknown = set(body) - {
                *(
                    "query",
                    "pit",
                    "_source",
                    "size",
                    "track_total_hits",
                    "timeout",
                    "min_score",
                    "sort",
                    "track_scores",
                ),
                "docvalue_fields",
            }
            if unknown:
                raise EngineError(400, "parsing_exception", f"unknown key {sorted(unknown)}")
            return self.hits(documents, body)
        except EngineError as error:
            if error.args[1] == "parsing_exception":
                raise  # A search that cannot be read is refused together with all others of its request.
            return error.body

    def hits(self, documents: Documents, body: dict) -> dict:
        ascending = body.get("sort") == [{"_score": "asc"}]
        found = documents.scores(body["query"])
        scores = np.fromiter(found.values(), np.float32, len(found))
        if self.jitter is not None:
            scores = np.array([self.jitter(score, ascending) for score in scores], np.float32)
        least = float(np.float32(body.get("min_score", -np.inf)))
        # Floats of Python: they are compared and looked up much faster than those of numpy, and are the same numbers.
        kept = {one: score for one, score in zip(found, scores.tolist(), strict=True) if score >= least}
        # The engine's own order of equal scores is not that of the catalogue.
        order = heapq.nsmallest(body["size"], kept, key=lambda one: (kept[one] if ascending else -kept[one], one[::-1]))
        hits = [self.hit(documents, one, float(str(np.float32(kept[one]))), body) for one in order]
        total = {"total": {"value": len(kept), "relation": "eq"}} if body["track_total_hits"] else {}
        return {
            "timed_out": False,
            "_shards": {"total": 1, "failed": 0},
            "hits": {**total, "hits": hits},
            "status": 200,
        }


def seconds(keep_alive: str) -> float:
    return time.monotonic() + int(keep_alive[:-1]) * {"s": 1, "m": 60, "h": 3600}[keep_alive[-1]]


REAL = os.environ.get("REC_R1_OPENSEARCH_URL")
_built: set[tuple[str, str]] = set()  # (url, alias) of each index that :func:`opened` has built.


@functools.cache
def shared(product: str) -> Standin:
    """The stand-in of a product that all tests of a process share."""
    return Standin(product)


def opened(product: str, catalog: Catalog, folder=None, **params):
    """A retriever over an index that is built from ``catalog``, on the real cluster if there is one."""
    url = REAL or shared(product).url
    retriever = retrievers.open("opensearch", catalog, folder, url=url, **params)
    _built.add((url, retriever._searches.index.name))
    return retriever


def delete_built() -> None:
    """Delete the indexes that :func:`opened` has built on a real cluster, and no others."""
    from retrievers.text.opensearch.backend import Params
    from retrievers.text.opensearch.cluster import Cluster

    for url, alias in _built if REAL else ():
        cluster = Cluster(Params(url=url).address())
        for index in cluster.ask("GET", f"/_alias/{alias}"):
            assert index.startswith(f"{alias}-")
            cluster.change("DELETE", f"/{index}")
    _built.clear()


if __name__ == "__main__":
    standin = Standin(*sys.argv[2:3], port=int(sys.argv[1]))
    if sys.argv[3:]:
        english = {"analyzer": {"default": {"type": "english"}}}
        standin.add("shop", json.loads(Path(sys.argv[3]).read_text()), analysis=english)
    print(standin.url, flush=True)
    threading.Event().wait()
