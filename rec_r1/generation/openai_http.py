"""One request to an OpenAI-compatible server: what is sent, what comes back, and what is wrong. The key goes
into the header and nowhere else; a server's message that repeats it is cleaned."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from rec_r1.config import UserError
from rec_r1.config.redaction import MARK, printable, redact_text, secret_values
from rec_r1.prompts import Prompt
from retrievers.serving.client import retry_after

if TYPE_CHECKING:
    from rec_r1.generation.endpoint import Endpoint

PATIENCE_S = 300.0  # a server that asks for a longer pause is out of quota rather than busy


class Answer(NamedTuple):
    """What the model wrote, and how many tokens prompt and completion were; None = the server does not say."""

    text: str
    tokens: Sequence[int] | None


class TroubleError(Exception):
    """No answer, or not now: worth another attempt, ``pause`` seconds from now where the server says so."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


def request(prompt: Prompt, endpoint: Endpoint) -> tuple[str, bytes]:
    """The address and the body. ASCII and sorted: half a character (\\ud83d) passes, and equal bodies are equal."""
    chat = not isinstance(prompt, str)
    body = {"model": endpoint.model, "messages" if chat else "prompt": prompt, "max_tokens": endpoint.max_tokens}
    body |= {"temperature": endpoint.temperature, "top_p": endpoint.top_p} | endpoint.extra
    sent = {name: value for name, value in body.items() if value is not None}
    path = "/chat/completions" if chat else "/completions"
    return endpoint.url.rstrip("/") + path, json.dumps(sent, sort_keys=True).encode()


class Client:
    """A connection pool to one endpoint; safe between threads. Raises UserError for a key that cannot be sent."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.key = os.environ.get(endpoint.key_variable, "").strip()
        if re.search(r"[^!-~]", self.key):  # httpx would refuse it, and show it
            raise UserError(f"${endpoint.key_variable} holds an invalid character, such as a blank: set it again")
        self._http = _client(endpoint, self.key)

    def close(self) -> None:
        self._http.close()

    def post(self, url: str, body: bytes) -> Answer:
        """One attempt. Raises TroubleError, and UserError where the server refuses: another attempt is of no use."""
        import httpx

        try:
            response = self._http.post(url, content=body)
        except httpx.RequestError as error:
            raise TroubleError(self._line(f"{type(error).__name__}: {error}")) from error
        except (httpx.InvalidURL, UnicodeError) as error:  # such as a label of more than 63 letters
            raise UserError(f"endpoint {url}: no address ({error}): check the url") from error
        try:
            answer = response.json()
        except (ValueError, RecursionError):
            answer = None
        code, failed = response.status_code, isinstance(answer, dict) and bool(answer.get("error"))
        if code == 200 and not failed:
            try:
                return _read(answer)
            except (KeyError, IndexError, TypeError, AttributeError):
                pass  # somebody else's page: asking again changes nothing
        said = f"status {code}: {self._line(_message(answer) or response.text or 'no completion')}"
        if (failed and code == 200) or code in (408, 409, 429) or code >= 500:  # gateways send errors with a 200
            pause = retry_after(response.headers.get("retry-after", ""))
            if pause is None or pause <= PATIENCE_S:
                raise TroubleError(said, pause)
            said += f": it wants a pause of {pause:.0f} s"
        raise UserError(f"endpoint {url}: {said}: {self._fix(code)}")

    def _fix(self, code: int) -> str:
        if code in (401, 403):
            return f"check the key in ${self.endpoint.key_variable}" + ("" if self.key else ", which is not set")
        if code in (400, 404, 422):
            return f"check the model's name ({self.endpoint.model!r}), the url (mostly …/v1) and what `extra` adds"
        return "run again later" if code == 429 or code >= 500 else "check the url, mostly …/v1"

    def _line(self, text: str) -> str:
        """``text`` as a short line without the key and the secrets of `extra`, which some servers repeat."""
        text = " ".join("".join(c if c.isprintable() else " " for c in printable(text)).split())
        text = text.replace(self.key, f"${self.endpoint.key_variable}") if self.key else text
        for secret in secret_values(self.endpoint.extra):
            text = text.replace(secret, MARK)
        return redact_text(text)[:300]


def _client(endpoint: Endpoint, key: str) -> Any:
    import httpx

    return httpx.Client(
        headers={"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {}),
        timeout=httpx.Timeout(endpoint.timeout_s, connect=min(10.0, endpoint.timeout_s), pool=None),
        limits=httpx.Limits(max_connections=endpoint.concurrency),
        # a proxy is for the web: a server of this machine is behind none
        trust_env=urlsplit(endpoint.url).hostname not in ("localhost", "127.0.0.1", "::1"),
    )


def _read(answer: Any) -> Answer:
    """Raises KeyError, IndexError, TypeError or AttributeError where this is no completion."""
    choice = answer["choices"][0]
    text = choice["message"].get("content") if "message" in choice else choice["text"]
    if isinstance(text, list):  # in parts; those of a reasoning model's thinking have another type
        text = "".join(part["text"] for part in text if part.get("type") == "text")
    text = text if isinstance(text, str) else ""
    usage = answer.get("usage")
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else []
    tokens = [count for count in counts if type(count) is int]
    # JSON can spell half a character, which no file takes
    return Answer(text.encode("utf-8", "replace").decode(), tokens if len(tokens) == 2 else None)


def _message(answer: Any) -> str:
    """What a server says is wrong: {"error": {"message": …}}, {"error": …}, {"detail": …}, {"message": …}."""
    for name in ("error", "detail", "message"):
        if isinstance(answer, dict) and answer.get(name):
            return _message(answer[name]) or str(answer[name])
    return ""
