"""How `opensearch` connects: credentials, certificates, other servers, and mistakes in the parameters."""

import base64
import importlib.util
import logging
import pickle
import shutil
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
import uvicorn
from opensearch_data import CATALOG, EVERY, QUERIES, assert_like_bm25, both, connect
from standin import Standin
from starlette.responses import JSONResponse

import retrievers
from retrievers import RetrieverError
from retrievers.text.opensearch import queries
from retrievers.text.opensearch.params import Params


def basic(user, password):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.slow
@both
def test_credentials_come_from_the_environment_and_stay_there(standin, monkeypatch, caplog, tmp_path):
    caplog.set_level(logging.DEBUG)
    standin.authorization = basic("shop", "s3cret-wörd")
    with pytest.raises(RetrieverError, match=r"status 401, security_exception: .*: check \$REC_R1_OPENSEARCH_USER"):
        connect(standin, index="shop")
    monkeypatch.setenv("REC_R1_OPENSEARCH_USER", "shop")
    with pytest.raises(RetrieverError, match="is set without"):
        connect(standin, index="shop")
    monkeypatch.setenv("REC_R1_OPENSEARCH_PASSWORD", "s3cret-wörd")
    retriever = connect(standin, folder=tmp_path, index="shop")
    assert_like_bm25(retriever)
    monkeypatch.setenv("REC_R1_OPENSEARCH_PASSWORD", "s3cret-wrong")
    other = pickle.loads(pickle.dumps(retriever))
    with pytest.raises(RetrieverError, match="401") as caught:
        other.ranks(QUERIES, EVERY)
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    everything = [str(caught.value), caplog.text, written, retriever.fingerprint, str(vars(retriever))]
    secrets = "s3cret", basic("shop", "s3cret-wörd")[6:], basic("shop", "s3cret-wrong")[6:]
    assert not [secret for secret in secrets for text in everything if secret in text]
    assert not any(secret.encode() in pickle.dumps(retriever) for secret in secrets)


@both
def test_an_api_key(standin, monkeypatch):
    standin.authorization = "ApiKey s3cret=="
    monkeypatch.setenv("REC_R1_OPENSEARCH_API_KEY", "s3cret==")
    assert_like_bm25(connect(standin, index="shop"))
    monkeypatch.setenv("REC_R1_OPENSEARCH_API_KEY", "s3cret\n==")
    with pytest.raises(RetrieverError, match="has a character that a key cannot have") as caught:
        connect(standin, index="shop")
    assert "s3cret" not in str(caught.value)
    monkeypatch.setenv("REC_R1_OPENSEARCH_USER", "shop")
    with pytest.raises(RetrieverError, match="unset one of them"):
        connect(standin, index="shop")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1 that no authority has signed, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    made = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=standin -addext subjectAltName=IP:127.0.0.1"
    paths = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", *made.split(), "-out", paths[0], "-keyout", paths[1]], check=True, capture_output=True, timeout=60
    )
    return paths


@pytest.mark.slow
@both
def test_certificates_are_verified(standin, certificate):
    config = uvicorn.Config(
        standin.app(), port=0, ssl_certfile=certificate[0], ssl_keyfile=certificate[1], log_level="error"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    secure = SimpleNamespace(url=f"https://127.0.0.1:{port}")
    with pytest.raises(RetrieverError, match=r"no Elasticsearch or OpenSearch answers at https://.*(?i:certificate)"):
        connect(secure, index="shop")
    retriever = connect(secure, index="shop", ca_certs=str(certificate[0]))
    assert_like_bm25(retriever)
    retriever._searches.close()
    server.should_exit = server.force_exit = True
    thread.join(timeout=30)


@both
def test_other_servers_and_old_versions_are_refused(standin):
    product = standin.root
    for root, message in (
        ({"hello": "world"}, "neither Elasticsearch nor OpenSearch|no Elasticsearch or OpenSearch answers"),
        (
            product | {"version": product["version"] | {"number": "1.3.2"}},
            "is (opensearch|elasticsearch) 1.3.2: upgrade",
        ),
    ):
        standin.root = root
        if "hello" in root and standin.product == "elasticsearch":
            continue  # A header of the answer names the product.
        with pytest.raises(RetrieverError, match=message):
            connect(standin)
    standin.root = product
    with pytest.raises(RetrieverError, match=r"no Elasticsearch or OpenSearch answers at http://127.0.0.1:9 \("):
        retrievers.open("opensearch", CATALOG, url="http://127.0.0.1:9", retries=0)


@both
def test_a_user_who_may_not_ask_what_the_cluster_is_reads_which_permission_is_missing(standin):
    reason = "action [cluster:monitor/main] is unauthorized, this action is granted by the cluster privileges [monitor]"
    refusal = {"error": {"type": "security_exception", "reason": reason}, "status": 403}
    standin.trouble = lambda method, path: JSONResponse(refusal, 403)
    with pytest.raises(RetrieverError, match=r"status 403, security_exception: .*privileges \[monitor\]: check"):
        connect(standin, index="shop")


def test_opensearch_in_its_compatibility_mode_is_found_out():
    standin = Standin()
    standin.root = {"version": {"number": "7.10.2", "lucene_version": "9.12.1"}, "tagline": standin.root["tagline"]}
    assert_like_bm25(connect(standin))
    standin.stop()


MISTAKES = [
    ({"url": "127.0.0.1:9200"}, r"url must be http\(s\)://HOST:PORT .* got '127.0.0.1:9200'"),
    ({"url": "https://me:s3cret@host:1"}, "set the user in [$]REC_R1_OPENSEARCH_USER"),
    ({"url": "https://host:1?key=s3cret"}, "without user, password and .query: set"),
    ({"index": ""}, "index must be a name or null, got ''"),
    ({"index": 3}, "index must be a name or null, got 3"),
    ({"fields": {}}, "fields must map fields to weights above 0 and below 1e6, got {}"),
    ({"fields": {"": 1}}, "fields must map fields to weights above 0 and below 1e6, got {'': 1}"),
    ({"fields": {"title": 1e7}}, "fields must map fields to weights above 0 and below 1e6, got {'title': 10000000.0}"),
    ({"fields": {"text": 0}}, "weights above 0"),
    ({"fields": {"text": True}}, "weights above 0"),
    ({"fields": {"text^9": 1}}, "weights above 0"),
    ({"fields": ["text"]}, "weights above 0"),
    ({"template": {"match": {"text": "party"}}}, "template holds no {query}"),
    ({"template": {"match": {"{query}": "{query}"}}}, "in the name of a key"),
    ({"template": {"script_score": {"query": {"match_all": {}}, "script": {"source": "{query}"}}}}, "code of a script"),
    ({"template": {"script_score": {"query": {"match_all": {}}, "script": "{query}"}}}, "code of a script"),
    ({"template": {"bool": {"must": [{"wrapper": {"query": "{query}"}}]}}}, "or in a wrapper"),
    ({"template": {"match": {"text": "{query}"}, "term": {}}}, "template must be one query"),
    ({"template": "{query}"}, "template must be one query"),
    ({"template": {"hybrid": {"queries": [{"match": {"text": "{query}"}}]}}}, "retriever.kind=hybrid"),
    ({"template": {"query": {"match": {"text": "{query}"}}, "rescore": {}}}, "'rescore' beside the query"),
    ({"filter": [{"term": {"brand": "{query}"}}]}, "must not depend on what a model writes"),
    ({"filter": {"term": {"brand": "acme"}}}, "filter must be a list of clauses"),
    ({"filter": [{"term": {}, "match": {}}]}, "filter must be a list of clauses"),
    ({"filter": [{"range": {"price": {"gte": float("nan")}}}]}, r"filter\[0\]\.range\.price\.gte is nan, which JSON"),
    ({"filter": [{"term": {"brand": {"a", "b"}}}]}, r"filter\[0\]\.term\.brand is of type set"),
    ({"filter": [{"term": {3: "a"}}]}, r"filter\[0\]\.term: the key 3 is no text: write it in quotes"),
    ({"template": {"match": {"text": "{query}", "boost": float("inf")}}}, r"template\.match\.boost is inf, which JSON"),
    ({"template": {"match": {"text": "{query}", "boost": 1j}}}, r"template\.match\.boost is of type complex"),
    ({"id_field": "code"}, "id_field is not read for an index that is built"),
    ({"snapshot": "a"}, "snapshot is not read for an index that is built"),
    ({"index": "shop", "k1": 2.0}, "k1 is not read for the existing index 'shop'"),
    ({"index": "shop", "language": "de"}, "language is not read for the existing index"),
    ({"template": {"match": {"title": "{query}"}}, "fields": {"title": 1}}, "fields is not read for a template"),
    ({"b": 3}, "b must be a number from 0 to 1"),
    ({"language": "klingon"}, "language: unknown 'klingon'"),
    ({"fields": {3: 1}}, "fields must map fields to weights"),
    ({"keep_alive": "²s"}, "keep_alive must be a time such as"),
    ({"keep_alive": "0s"}, "keep_alive must be a time such as"),
    ({"keep_alive": "soon"}, "keep_alive must be a time such as 90s, 10m or 2h, got 'soon'"),
    ({"batch_size": 0}, "batch_size must be an integer >= 1"),
    ({"connections": 0}, "connections must be an integer >= 1"),
    ({"retries": -1}, "retries must be an integer >= 0"),
    ({"timeout": 0}, "timeout must be a number above 0"),
    ({"requests_per_second": 0}, "requests_per_second must be a number above 0"),
    ({"ca_certs": "/nowhere.pem"}, "ca_certs: there is no file '/nowhere.pem'"),
]  # fmt: skip


@pytest.mark.parametrize(("params", "message"), MISTAKES)
def test_mistakes_are_named(params, message):
    with pytest.raises(ValueError, match=message) as caught:
        Params(**params)
    assert "s3cret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_script_may_take_the_text_in_its_params():
    script = {"source": "params.words", "params": {"words": "{query}"}}
    template = {"script_score": {"query": {"match": {"text": "{query}"}}, "script": script}}
    filled = queries.Form({}, Params(template=template).template, []).query("party")["bool"]["must"][0]
    assert filled["script_score"]["script"] == {"source": "params.words", "params": {"words": "party"}}


def test_ports_and_paths():
    given = ["http://a", "https://a", "https://a:7/x/", "http://[::1]", "http://[::1]:9"]
    expected = ["http://a:9200", "https://a:443", "https://a:7/x", "http://[::1]:9200", "http://[::1]:9"]
    assert [Params(url=url).address().with_port for url in given] == expected


def test_a_missing_package_says_which_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "opensearchpy" else found(name)
    )
    message = r"needs opensearchpy, which is not installed: pip install 'rec-r1\[opensearch\]'"
    with pytest.raises(RetrieverError, match=message):
        retrievers.open("opensearch", CATALOG)
