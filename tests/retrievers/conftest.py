"""The stand-ins of Elasticsearch and OpenSearch, for the tests of `opensearch`."""

import pytest


@pytest.fixture(scope="module")
def standins():
    from standin import Standin

    found = {product: Standin(product) for product in ("opensearch", "elasticsearch")}
    yield found
    for one in found.values():
        one.stop()


@pytest.fixture
def standin(request, standins):
    """A stand-in of OpenSearch, or of the product that `both` names. No request to it fails, and its index `shop` holds
    the catalogue's documents."""
    from opensearch_data import ENGLISH, SOURCES

    one = standins[getattr(request, "param", "opensearch")]
    one.trouble = one.search_trouble = lambda *_: None
    one.jitter = lambda score, ascending: score
    one.authorization = None
    one.add("shop", SOURCES, **ENGLISH)
    one.received.clear()
    return one


@pytest.fixture
def no_pauses(monkeypatch):
    """The seconds that would be waited between attempts."""
    pauses = []
    monkeypatch.setattr("tenacity.nap.time.sleep", pauses.append)
    return pauses
