"""The traits of a served retriever, as the client of `rec-r1 serve` has them."""

import pickle

import httpx
import numpy as np
import pytest
from serving import serve, start
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

import retrievers
from retrievers import Catalog, RetrieverError

CATALOG = Catalog.from_records({"id": str(i), "text": f"party {i}"} for i in range(40))
BM25 = retrievers.open("bm25", CATALOG)


def connect(url):
    return retrievers.open("remote", CATALOG, url=url, retries=0)


def served(health) -> str:
    """The address of a server with this answer to /health."""
    return start(Starlette(routes=[Route("/health", lambda _: JSONResponse(health))]))[0]


class Lacking:
    """BM25 over an index that lacks some documents."""

    fingerprint, search, ranks = BM25.fingerprint, staticmethod(BM25.search), staticmethod(BM25.ranks)

    def retriever_traits(self):
        return retrievers.Traits(absent=[np.int64(3), 39])


def test_what_the_index_of_the_server_lacks_is_known_here(caplog):
    remote = connect(serve(retrievers.Cache(Lacking(), len(CATALOG)), CATALOG))
    assert retrievers.absent(remote) == retrievers.absent(pickle.loads(pickle.dumps(remote))) == {3, 39}
    assert "lacks 2 of the 40 documents of the catalogue" in caplog.text and "the first: '3', '39'" in caplog.text
    fused = retrievers.Unseen(remote, len(CATALOG))
    assert retrievers.absent(fused) == {3, 39}


@pytest.mark.parametrize("absent", [None, "3", [40], [-1], [True], ["3"], [1.0]])
def test_rows_that_cannot_be_absent_are_refused(absent):
    health = httpx.get(serve(BM25, CATALOG) + "/health").json()
    url = served(health | {"absent": absent})
    with pytest.raises(RetrieverError, match="is no `rec-r1 serve`"):
        connect(url)


def test_a_server_of_an_earlier_version_says_less():
    whole = httpx.get(serve(BM25, CATALOG) + "/health").json()
    health = {name: whole[name] for name in ("status", "kind", "fingerprint", "catalog", "documents")}
    remote = connect(served(health))
    assert retrievers.absent(remote) == set() and retrievers.reads_text(remote)
