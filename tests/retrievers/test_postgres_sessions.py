"""Sessions of a real PostgreSQL that is killed, stopped and started again, or that limits them."""

import logging
import pickle
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psycopg
import pytest
from postgres_data import CATALOG, ranking
from postgres_server import Server, server

import retrievers
from retrievers import Query, RetrieverError
from retrievers.text.postgres.connection import Sessions, _settings


@pytest.fixture
def own_server():
    """A server that a test may kill."""
    running = Server()
    yield running
    running.stop()


@pytest.mark.slow
def test_a_server_that_is_killed_stopped_and_started_again(own_server):
    address = own_server.database("shop")
    retriever = retrievers.open("postgres", CATALOG, url=address, timeout=1)
    asked, targets = [Query("party"), Query("shoes")], np.array([[1, 2], [3, -1]])
    before = retriever.ranks(asked, targets).tolist()
    copy = pickle.loads(pickle.dumps(retriever))
    with ThreadPoolExecutor(4) as pool:  # Four connections, all of which are lost.
        assert list(pool.map(lambda _: copy.ranks(asked, targets).tolist(), range(8))) == [before] * 8
    own_server.kill()
    for one in (retriever, copy):
        with pytest.raises(ConnectionError, match=f"PostgreSQL at {address[:20]}"):
            one.ranks(asked, targets)
    with pytest.raises(RetrieverError, match=r"no connection to PostgreSQL.*start it"):
        retrievers.open("postgres", CATALOG, url=address, timeout=1)
    own_server.start()
    for one in (retriever, copy):
        assert one.ranks(asked, targets).tolist() == before
    own_server.kill()
    own_server.start()  # Nobody asked in between: the lost connections are replaced, and no query is lost.
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: copy.ranks(asked, targets).tolist(), range(8))) == [before] * 8


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_an_outage(own_server, monkeypatch):
    monkeypatch.setattr("retrievers.text.postgres.connection.GRACE", 0.2)
    address = own_server.database("shop")
    retriever = retrievers.open("postgres", CATALOG, url=address, timeout=0.5)
    assert retriever.search([Query("party")], 1).rows[0, 0] >= 0
    with psycopg.connect(address) as connection:
        connection.execute(f'LOCK TABLE "{retriever._source.table}" IN ACCESS EXCLUSIVE MODE')
        with pytest.raises(TimeoutError, match="statement timeout"):
            retriever.search([Query("party")], 1)
    assert retriever.search([Query("party")], 1).rows[0, 0] >= 0
    own_server.send(signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises((ConnectionError, TimeoutError)):
        retriever.search([Query("party")], 1)
    waited = time.monotonic() - started
    own_server.send(signal.SIGCONT)
    logging.getLogger(__name__).info("an outage after %.1f s", waited)
    assert retriever.search([Query("party")], 1).rows[0, 0] >= 0


@pytest.mark.slow
def test_a_server_that_ends_idle_sessions_costs_no_query():
    address = server().database("idle")
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("ALTER DATABASE idle SET idle_session_timeout = '200ms'")
    retriever = retrievers.open("postgres", CATALOG, url=address)
    asked, targets = [Query("party"), Query("shoes")], np.array([[1, 2], [3, -1]])
    expected = retriever.ranks(asked, targets).tolist()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            assert list(pool.map(lambda _: retriever.ranks(asked, targets).tolist(), range(8))) == [expected] * 8
            time.sleep(0.6)


@pytest.mark.slow
def test_a_user_with_fewer_connections_than_threads():
    address = server().database("narrow")
    made = retrievers.open("postgres", CATALOG, url=address)
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("CREATE ROLE narrow LOGIN CONNECTION LIMIT 2")
        connection.execute(f'GRANT SELECT ON "{made._source.table}" TO narrow')
    narrow = retrievers.open("postgres", CATALOG, url=address.replace("postgres@", "narrow@"), connections=8)
    asked, targets = [Query("party"), Query("shoes")], np.array([[1, 2], [3, -1]])
    expected = made.ranks(asked, targets).tolist()
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda _: narrow.ranks(asked, targets).tolist(), range(64))) == [expected] * 64


def test_a_very_short_timeout_is_one():
    """For PostgreSQL, 0 milliseconds are no limit."""
    assert [_settings(seconds)["statement_timeout"] for seconds in (1e-5, 0.0012, 60.0)] == ["1", "2", "60000"]


@pytest.mark.slow
def test_a_setting_that_the_server_refuses_is_no_outage():
    sessions = Sessions(server().database("settings"), 1.0, 1, {"work_mem": "much"})
    with pytest.raises(RetrieverError, match='invalid value for parameter "work_mem": "much"'):
        sessions.ask(psycopg.sql.SQL("SELECT 1").format(), [{}])


PASSWORD = "p@ss:w/ö%20\\ '\"#?&=s3cret"


@pytest.mark.slow
def test_passwords_are_those_of_the_environment(tmp_path, monkeypatch, caplog):
    """$PGPASSWORD, $PGPASSFILE and $PGSERVICEFILE, as for every program that uses PostgreSQL's own library."""
    caplog.set_level(logging.DEBUG)
    address = server().database("passwords")
    made = retrievers.open("postgres", CATALOG, url=address)
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(psycopg.sql.SQL("CREATE ROLE locked LOGIN PASSWORD {}").format(PASSWORD))
        connection.execute(f'GRANT SELECT ON "{made._source.table}" TO locked')
    rules = server().folder / "data" / "pg_hba.conf"
    rules.write_text(f"local all locked scram-sha-256\n{rules.read_text()}")
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("SELECT pg_reload_conf()")
    locked = address.replace("postgres@", "locked@")

    def fails(message: str) -> str:
        with pytest.raises(RetrieverError, match=message) as caught:
            retrievers.open("postgres", CATALOG, url=locked)
        return str(caught.value)

    said = fails("no password supplied.*PGPASSWORD or ~/.pgpass")
    monkeypatch.setenv("PGPASSWORD", PASSWORD[:-1])
    said += fails("password authentication failed")
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    retriever = retrievers.open("postgres", CATALOG, url=locked)
    assert ranking(retriever, "party") == ranking(made, "party")
    monkeypatch.delenv("PGPASSWORD")
    file = tmp_path / "passwords"
    escaped = PASSWORD.replace("\\", "\\\\").replace(":", "\\:")
    file.write_text(f"*:*:passwords:locked:{escaped}\n")
    file.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(file))
    assert ranking(pickle.loads(pickle.dumps(retriever)), "party") == ranking(made, "party")
    services = tmp_path / "services"
    services.write_text(f"[theirs]\nhost={server().folder}\ndbname=passwords\nuser=locked\n")
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    service = retrievers.open("postgres", CATALOG, url="postgresql://?service=theirs")
    assert service.fingerprint == made.fingerprint and ranking(service, "party") == ranking(made, "party")
    everything = said, caplog.text, str(vars(retriever)), repr(pickle.dumps(retriever)), retriever.fingerprint
    assert not [text for text in everything if "s3cret" in text]


@pytest.mark.slow
def test_a_server_or_a_user_that_may_not_write_builds_nothing():
    address = server().database("standby")
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("ALTER DATABASE standby SET default_transaction_read_only = on")
    with pytest.raises(RetrieverError, match="read-only transaction: build the table by `rec-r1 index RECIPE` with"):
        retrievers.open("postgres", CATALOG, url=address)
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("SET default_transaction_read_only = off")
        connection.execute("ALTER DATABASE standby RESET default_transaction_read_only")
    made = retrievers.open("postgres", CATALOG, url=address)
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("ALTER DATABASE standby SET default_transaction_read_only = on")
    assert ranking(retrievers.open("postgres", CATALOG, url=address), "party") == ranking(made, "party")
