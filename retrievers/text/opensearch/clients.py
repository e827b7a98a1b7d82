"""The official client of each product, as a function that sends a request and returns status, headers and JSON."""

from __future__ import annotations

import base64
import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from retrievers.text.opensearch.params import API_KEY, PASSWORD, USER, Address
from retrievers.types import RetrieverError

INSTALL = "pip install 'rec-r1[opensearch]'"
# (method, path, params, body, headers, timeout in seconds) -> (status, headers in lower case, JSON value or None)
Send = Callable[[str, str, dict[str, str], bytes | None, dict[str, str], float], tuple[int, Mapping[str, str], Any]]
for _name in ("opensearch", "elastic_transport.node_pool"):  # They warn of each request that fails, with tracebacks.
    logging.getLogger(_name).setLevel(logging.ERROR)


def check_installed() -> None:
    """Raise RetrieverError where a package is missing."""
    for name in ("opensearchpy", "elasticsearch", "tenacity"):
        if importlib.util.find_spec(name) is None:
            raise RetrieverError(f"retriever.kind: opensearch needs {name}, which is not installed: {INSTALL}")


def _credentials() -> dict[str, str]:
    """The header with the credentials in the environment; none where there are none.

    Raises RetrieverError, without the values, for variables that do not go together.
    """
    user, password, key = (os.environ.get(name) or "" for name in (USER, PASSWORD, API_KEY))
    if key and (user or password):
        raise RetrieverError(f"${API_KEY} and ${USER} or ${PASSWORD} are set: unset one of them")
    if bool(user) != bool(password):
        raise RetrieverError(f"${USER if user else PASSWORD} is set without ${PASSWORD if user else USER}: set both")
    if key:
        if re.search(r"[^!-~]", key):
            raise RetrieverError(f"${API_KEY} has a character that a key cannot have, such as a space: set it again")
        return {"authorization": f"ApiKey {key}"}
    return {"authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"} if user else {}


def opensearch_client(address: Address) -> Send:
    """Requests by opensearch-py."""
    from opensearchpy import OpenSearch

    more: dict[str, Any] = {"ca_certs": address.ca_certs} if address.ca_certs else {}
    client = OpenSearch(
        [address.with_port],
        headers=_credentials(),
        timeout=address.timeout,
        max_retries=0,
        pool_maxsize=address.connections,
        **more,
    )

    def send(
        method: str, path: str, params: dict[str, str], body: bytes | None, headers: dict[str, str], timeout: float
    ) -> tuple[int, Mapping[str, str], Any]:
        # The transport above the connection drops the headers of an error, and with them Retry-After.
        connection = client.transport.get_connection()
        status, found, text = connection.perform_request(
            method, path, params, body, timeout=timeout, ignore=range(300, 600), headers=headers
        )
        return status, {name.lower(): value for name, value in found.items()}, _json(text)

    return send


def elasticsearch_client(address: Address) -> Send:
    """Requests by elasticsearch-py, which also asks for the format of its own major version."""
    from elasticsearch import ApiError, Elasticsearch

    # Without https, the client refuses it.
    more: dict[str, Any] = {"ca_certs": address.ca_certs} if address.ca_certs and address.url[:6] == "https:" else {}
    client = Elasticsearch(
        address.with_port,
        headers=_credentials(),
        max_retries=0,
        retry_on_timeout=False,
        connections_per_node=address.connections,
        **more,
    )

    def send(
        method: str, path: str, params: dict[str, str], body: bytes | None, headers: dict[str, str], timeout: float
    ) -> tuple[int, Mapping[str, str], Any]:
        try:
            response = client.options(request_timeout=timeout).perform_request(
                method, path, params=params, headers=headers, body=body
            )
        except ApiError as error:
            return error.meta.status, dict(error.meta.headers), error.body
        return response.meta.status, dict(response.meta.headers), response.body

    return send


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
