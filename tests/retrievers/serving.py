"""A real `rec-r1 serve` application on a real socket, in a thread of this process."""

import threading
import time

import uvicorn

from retrievers.serving import http_server, server


def serve(retriever, catalog, port=0, **options) -> str:
    """Serve until the process ends; the URL."""
    return start(server.app(retriever, "bm25", catalog.fingerprint, len(catalog), **options), port)[0]


def start(application, port=0, headers_s=http_server.HEADERS_TIMEOUT_S):
    """(url, stop)"""
    listening = http_server.listen("127.0.0.1", port)
    running = uvicorn.Server(http_server.server_config(application, headers_s))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.005)

    def stop():
        running.should_exit = running.force_exit = True
        thread.join()
        listening.close()

    return f"http://127.0.0.1:{listening.getsockname()[1]}", stop
