"""One request to an OpenAI-compatible server, its completion, and its errors.

The key is sent in the header only. It is removed from every message of the server that repeats it.
"""

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
from retrievers.core.requests import retry_after

if TYPE_CHECKING:
    from rec_r1.generation.endpoint import Endpoint

LONGEST_PAUSE_S = 300.0  # A server that asks for a longer pause, in seconds, is out of quota and not only busy.


class Answer(NamedTuple):
    """A completion.

    text: what the model wrote.
    tokens: the numbers of tokens of the prompt and of the completion. None = the server does not count them.
    """

    text: str
    tokens: Sequence[int] | None


class RefusedRequestError(UserError):
    """The server refuses this request, for example because its prompt is too long. Others may succeed."""


class TroubleError(Exception):
    """A failure after which another attempt may succeed.

    reason: the message.
    pause: how many seconds the server asks to wait before that attempt. None = it does not say.
    """

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


def request(prompt: Prompt, endpoint: Endpoint) -> tuple[str, bytes]:
    """The URL and the body of a request for one completion.

    prompt: the prompt. A string goes to /completions, and chat messages go to /chat/completions.
    endpoint: the server, the model and the options.

    The body is ASCII with sorted keys, so that equal requests are equal bytes, and a lone surrogate such as \\ud83d can
    be sent.
    """
    chat = not isinstance(prompt, str)
    body = {"model": endpoint.model, "messages" if chat else "prompt": prompt, "max_tokens": endpoint.max_tokens}
    body |= {"temperature": endpoint.temperature, "top_p": endpoint.top_p} | endpoint.extra
    fields = {name: value for name, value in body.items() if value is not None}
    path = "/chat/completions" if chat else "/completions"
    return endpoint.url.rstrip("/") + path, json.dumps(fields, sort_keys=True).encode()


class Client:
    """The connections to one endpoint. Threads may share them. Raises UserError for a key that cannot be sent."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.key = os.environ.get(endpoint.key_variable, "").strip()
        if re.search(r"[^!-~]", self.key):  # httpx would refuse it with a message that shows it.
            raise UserError(f"${endpoint.key_variable} holds an invalid character, such as a space: set it again")
        self._http = _client(endpoint, self.key)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def post(self, url: str, body: bytes) -> Answer:
        """Send a request once, and return the completion.

        url, body: the result of :func:`request`.

        Raises TroubleError where another attempt may succeed, and UserError where it cannot: RefusedRequestError
        where only this request is refused.
        """
        import httpx

        try:
            response = self._http.post(url, content=body)
        except httpx.RequestError as error:
            raise TroubleError(self._line(f"{type(error).__name__}: {error}")) from error
        except (httpx.InvalidURL, UnicodeError) as error:  # For example, a host name that is too long.
            raise UserError(f"endpoint {url}: not a valid address ({error}): check the url") from error
        try:
            answer = response.json()
        except (ValueError, RecursionError):
            answer = None
        code, failed = response.status_code, isinstance(answer, dict) and bool(answer.get("error"))
        if code == 200 and not failed:
            try:
                return _read(answer)
            except (KeyError, IndexError, TypeError, AttributeError):
                pass  # The response is of another service, and another attempt would return the same.
        reason = f"status {code}: {self._line(_message(answer) or response.text or 'no completion')}"
        if (failed and code == 200) or code in (408, 409, 429) or code >= 500:  # Gateways send errors with status 200.
            pause = retry_after(response.headers.get("retry-after", ""))
            if pause is None or pause <= LONGEST_PAUSE_S:
                raise TroubleError(reason, pause)
            reason += f": the server asks for a pause of {pause:.0f} s"
        kind = RefusedRequestError if code in (400, 413, 422) else UserError
        raise kind(f"endpoint {url}: {reason}: {self._fix(code)}")

    def _fix(self, code: int) -> str:
        """What the user can do about a status code."""
        if code in (401, 403):
            return f"check the key in ${self.endpoint.key_variable}" + ("" if self.key else ", which is not set")
        if code in (400, 404, 422):
            name = repr(self.endpoint.model)
            return f"check the model's name ({name}), the url (it usually ends with /v1) and the fields of `extra`"
        return "run again later" if code == 429 or code >= 500 else "check the url, which usually ends with /v1"

    def _line(self, text: str) -> str:
        """A server's message on one short line. The key and the secrets of `extra` are removed from it."""
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
        # A proxy cannot reach a server on this machine.
        trust_env=urlsplit(endpoint.url).hostname not in ("localhost", "127.0.0.1", "::1"),
    )


def _read(answer: Any) -> Answer:
    """The completion in a response. Raises KeyError, IndexError, TypeError or AttributeError where it holds none."""
    choice = answer["choices"][0]
    text = choice["message"].get("content") if "message" in choice else choice["text"]
    if isinstance(text, list):  # Parts of a text. A reasoning model's thoughts have another type.
        text = "".join(part["text"] for part in text if part.get("type") == "text")
    text = text if isinstance(text, str) else ""
    usage = answer.get("usage")
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else []
    tokens = [count for count in counts if type(count) is int]
    # JSON can hold a lone surrogate, which cannot be written to a file.
    return Answer(text.encode("utf-8", "replace").decode(), tokens if len(tokens) == 2 else None)


def _message(answer: Any) -> str:
    """The error message in a response: {"error": {"message": …}}, {"error": …}, {"detail": …}, or {"message": …}."""
    for name in ("error", "detail", "message"):
        if isinstance(answer, dict) and answer.get(name):
            return _message(answer[name]) or str(answer[name])
    return ""
