"""The documents and the query language of the stand-in cluster, see `standin.py`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import retrievers
from retrievers import Catalog, Query
from retrievers.text import bm25


class EngineError(Exception):
    """An error of the engine: (status, type, reason)."""

    @property
    def body(self) -> dict:
        status, kind, reason = self.args
        cause = {"type": kind, "reason": reason}
        return {"error": {"root_cause": [cause], **cause}, "status": status}


@dataclass
class Documents:
    """The documents of an index at one time."""

    sources: dict[str, dict]
    settings: dict
    models: dict = field(default_factory=dict)

    def params(self) -> dict:
        """The parameters of `bm25` that do what the settings of the index say."""
        similarity = self.settings.get("similarity", {}).get("default", {})
        language = {"english": "en"}.get(
            self.settings.get("analysis", {}).get("analyzer", {}).get("default", {}).get("type")
        )
        return {"language": language, "k1": similarity.get("k1", 1.2), "b": similarity.get("b", 0.75)}

    def terms(self, text: str) -> list[str]:
        return bm25.analyze([text], bm25.Params(**self.params()))[0]

    def matching(self, name: str, text: str) -> dict[str, float]:
        """id -> BM25 score of each document with a term of ``text`` in a field."""
        params = self.params()
        if len(self.terms(text)) > 1024:
            raise EngineError(
                400, "too_many_nested_clauses", "Query contains too many nested clauses; maxClauseCount is 1024"
            )
        if name not in self.models:
            ids = [one for one, source in self.sources.items() if name in source]
            texts = [{"id": one, "text": str(self.sources[one][name])} for one in ids]
            try:
                self.models[name] = ids, retrievers.open("bm25", Catalog.from_records(texts), **params), {}
            except ValueError:  # No document has a term.
                self.models[name] = [], None, {}
        ids, model, known = self.models[name]
        if model is not None and text not in known:  # Random queries of few words are often the same.
            hits = model.search([Query(text)], len(ids))
            pairs = zip(hits.rows[0].tolist(), hits.scores[0].tolist(), strict=True)
            known[text] = {ids[row]: score for row, score in pairs if row >= 0}
        return known.get(text, {})

    def filtered(self, clause: dict) -> set[str]:
        return set(self.scores(clause))

    def scores(self, query: dict) -> dict[str, float]:
        """id -> score of each document that a query matches."""
        (kind, body), *more = query.items()
        if more:
            raise EngineError(400, "parsing_exception", f"expected [END_OBJECT] but found {more[0][0]}")
        if kind not in CLAUSES:
            raise EngineError(400, "parsing_exception", f"unknown query [{kind}]")
        return CLAUSES[kind](self, body)

    def mapping(self, field_: str) -> dict[str, dict]:
        """The type of a field and its settings: {"keyword": {…}}. {} = there is no such field."""
        name, _, inner = field_.partition(".")
        made = self.settings.get("properties", {}).get(name)
        if made is not None:
            return made["fields"] if inner else {name: made}
        known = {"type": "keyword", **self.settings.get("normalized", {}).get(field_, {})}
        return {field_: known} if field_ in self.settings.get("keywords", ()) else {}

    def _match_all(self, body: dict) -> dict[str, float]:
        return dict.fromkeys(self.sources, 1.0)

    def _bool(self, body: dict) -> dict[str, float]:
        if set(body) - {"must", "filter", "must_not", "should"}:
            raise EngineError(400, "x_content_parse_exception", f"[bool] unknown field in {sorted(body)}")
        parts = [self.scores(one) for one in body.get("must", [])]
        optional = [self.scores(one) for one in body.get("should", [])]
        allowed = [set(one) for one in parts] + [self.filtered(one) for one in body.get("filter", [])]
        if optional and not allowed:
            allowed = [set().union(*optional)]
        ids = set.intersection(*allowed) if allowed else set(self.sources)
        for one in body.get("must_not", []):
            ids -= self.filtered(one)
        return {one: sum(part.get(one, 0.0) for part in (*parts, *optional)) for one in ids}

    def _multi_match(self, body: dict) -> dict[str, float]:
        assert body["type"] == "most_fields"
        total: dict[str, float] = {}
        for name in body["fields"]:
            name, _, boost = name.partition("^")
            found = self.matching(name, body["query"])
            if "operator" in body:
                found = self.with_all_terms(name, body)
            for one, score in found.items():
                total[one] = total.get(one, 0.0) + float(boost or 1) * score
        return total

    def with_all_terms(self, name: str, body: dict) -> dict[str, float]:
        """The documents with all terms of a text in one field; every document, if the text has no term."""
        assert body["operator"] == "and" and body["zero_terms_query"] == "all"
        terms = set(self.terms(body["query"]))
        return {
            one: 1.0
            for one, source in self.sources.items()
            if not terms or terms <= set(self.terms(str(source.get(name, ""))))
        }

    def _match(self, body: dict) -> dict[str, float]:
        ((name, text),) = body.items()
        return self.matching(name, text["query"] if isinstance(text, dict) else text)

    def _query_string(self, body: dict) -> dict[str, float]:
        text = body["query"]
        if text.count('"') % 2 or text.count("(") != text.count(")"):
            raise EngineError(400, "query_shard_exception", f"Failed to parse query [{text[:40]}]")
        return self._match_all({}) if "*:*" in text else self.matching(body["default_field"], text)

    def counted(self, body: dict) -> dict:
        """The most frequent values of some fields among the documents that a query matches."""
        assert body["size"] == 0
        chosen, found = self.scores(body["query"]), {}
        for name, agg in body["aggs"].items():
            (terms,) = agg.values()
            assert terms["order"] == [{"_count": "desc"}, {"_key": "asc"}]
            values = Counter(self.sources[one][terms["field"]] for one in chosen if terms["field"] in self.sources[one])
            order = sorted(values.items(), key=lambda pair: (-pair[1], pair[0]))[: terms["size"]]
            found[name] = {"buckets": [{"key": key, "doc_count": count} for key, count in order]}
        return found

    def _ids(self, body: dict) -> dict[str, float]:
        return {one: 1.0 for one in body["values"] if one in self.sources}

    def _terms(self, body: dict) -> dict[str, float]:
        ((name, values),) = body.items()
        wanted = set(map(str, values))  # An engine reads the text of a number as this number.
        about = self.mapping(name).get("keyword", {})
        name = name.removesuffix(".keyword")
        kept = {one: str(source[name]) for one, source in self.sources.items() if name in source}
        # The engines are written in Java, which counts UTF-16 code units.
        longest = 2 * about.get("ignore_above", 1 << 30)
        return {
            one: 1.0 for one, value in kept.items() if value in wanted and len(value.encode("utf-16-le")) <= longest
        }

    def _term(self, body: dict) -> dict[str, float]:
        ((name, value),) = body.items()
        return self._terms({name: [value]})

    def _exists(self, body: dict) -> dict[str, float]:
        return {one: 1.0 for one, source in self.sources.items() if body["field"] in source}

    def _constant_score(self, body: dict) -> dict[str, float]:
        return dict.fromkeys(self.filtered(body["filter"]), float(body.get("boost", 1)))

    def _knn(self, body: dict) -> dict[str, float]:
        """A nearest-neighbour clause: the k best of a text, as if a model had embedded it."""
        scores = self.matching("text", body["text"])
        return dict(sorted(scores.items(), key=lambda one: -one[1])[: body["k"]])


# The clauses of the query language.
CLAUSES = {
    "match_all": Documents._match_all,
    "bool": Documents._bool,
    "multi_match": Documents._multi_match,
    "match": Documents._match,
    "query_string": Documents._query_string,
    "ids": Documents._ids,
    "terms": Documents._terms,
    "term": Documents._term,
    "exists": Documents._exists,
    "constant_score": Documents._constant_score,
    "knn": Documents._knn,
}
