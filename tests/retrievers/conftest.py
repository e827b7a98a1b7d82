"""A spawned process, and the stand-ins of Elasticsearch and OpenSearch for the tests of `opensearch`."""

import importlib.util
import multiprocessing

import pytest


@pytest.fixture(scope="session")
def spawned():
    """A spawned process, to which a test sends pickled retrievers. It opens, fits and builds nothing by itself.

    The files share it, because it takes far longer to import torch and the tests' modules than to search. A retriever
    that needs more than its pickle fails in the first test that sends one of its kind.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


@pytest.fixture(scope="session", autouse=True)
def java_compiles_quickly():
    """Java in the process of the tests uses its quick compiler alone, whose code computes the same numbers.

    The tests end long before what the other compiler gains is more than what it costs.
    """
    if importlib.util.find_spec("jnius_config") is not None:
        import jnius_config

        if not jnius_config.vm_running:
            jnius_config.add_options("-XX:TieredStopAtLevel=1")


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
    one.jitter = None
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
