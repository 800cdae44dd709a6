"""Many calls to an OpenAI-compatible endpoint, by the standard library alone: threads, time-outs, retries, a cache.

    calls = Endpoint(url, Calls(model="NAME", key="ENV_NAME"), read, folder)
    calls.ask(questions)                begins them and returns: the rollout goes on meanwhile
    values = calls.values(questions)    what read() makes of each reply; None where none was to be had

What was said is kept in folder/judge-RANK.jsonl by the sha256 of model and question, so that a resumed run hears the
same; a call that failed is not kept, and is made again. The key is read from the environment variable that is named,
goes into one header and nowhere else: not into files, not into messages, which for that reason repeat nothing that a
server wrote. Redirects are not followed: they would take it along.

Left out: streaming, several questions in one call.
"""

import hashlib
import json
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import errors
import ranks
from errors import InputError, one_line, read_text
from settings import Settings, setting

MOST_BYTES = 2**20  # of a reply
LONGEST_WAIT = 60.0  # seconds between two tries, whatever Retry-After says
AGAIN = {408, 409, 425, 429, *range(500, 600)}  # statuses that may be others next time
HINTS = {401: ", is the key right?", 403: ", is the key right?", 404: ", are URL and model right?"}


@dataclass(frozen=True)
class Calls(Settings):
    """What stands behind --judge URL:."""

    model: str = setting("", "its name there; must be given")
    key: str = setting("", "NAME of the environment variable that holds the key; none: no key is sent")
    timeout: float = setting(30.0, "seconds that a try may take", low=0.01, high=3600)
    tries: int = setting(5, "of each call", low=1, high=100)
    wait: float = setting(1.0, "seconds before the second try, twice as many before each next", high=60)
    threads: int = setting(16, "calls at a time, of each rank", low=1, high=1024)
    tokens: int = setting(400, "of a reply; a model that thinks aloud needs thousands", low=32, high=10**6)


class Again(Exception):
    """A try that failed in a way that another one may not; after: seconds to wait at least."""

    def __init__(self, words: str, after: float = 0.0):
        super().__init__(words)
        self.after = after


class Refused(Exception):
    """A try that every other would follow."""


class Endpoint:
    """POST {url}/chat/completions, as OpenAI, vLLM, llama.cpp's server and Ollama have it. read(text of a reply) gives
    a value that JSON can hold, or raises Again; read_saved(value) takes one from the file, ValueError for a wrong one.
    """

    def __init__(
        self,
        url: str,
        calls: Calls,
        read: Callable[[str], Any],
        read_saved: Callable[[Any], Any],
        folder: Path | None = None,
    ):
        check_url(url)
        self.url, self.calls, self.read, self.folder = url.rstrip("/"), calls, read, folder
        if not calls.model:
            raise InputError("--judge: model=NAME is needed, what the endpoint calls its model")
        # Neither the key nor what stands in place of its variable's name, which may be the key by mistake, is repeated.
        self.key = os.environ.get(calls.key) if calls.key else None
        if calls.key and not self.key:
            raise InputError("--judge: key= must be the NAME of an environment variable that holds the key; none is so")
        if self.key and not re.fullmatch(r"[!-~]+", self.key):
            raise InputError(f"--judge: the key in ${calls.key} has blanks or characters that no header may hold")
        near = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")  # no proxy can know what is meant by these
        if self.key and not near and urlsplit(url).scheme == "http":
            raise InputError("--judge: to another machine the key would go in clear by http://; use https://")
        self.open = urllib.request.build_opener(Unmoved, *[urllib.request.ProxyHandler({})] * near).open
        self.known = read_cache(folder, read_saved)
        self.file = None
        self.pending: dict[str, Future] = {}  # of the main thread alone
        self.queue: queue.SimpleQueue = queue.SimpleQueue()
        self.started, self.lock = 0, threading.Lock()
        self.made = self.retried = 0  # tries, and those after the first of a call, since the run began
        self.why = ""  # of the last try that failed

    def ask(self, questions: Sequence[str]) -> None:
        for question in questions:
            key = self.digest(question)
            if key in self.known or key in self.pending:
                continue
            self.pending[key] = Future()
            self.queue.put((key, question, self.pending[key]))
            if self.started < min(len(self.pending), self.calls.threads):
                self.started += 1  # a daemon: a process that ends waits for no endpoint
                threading.Thread(target=self._serve, name=f"calls-{self.started}", daemon=True).start()

    def values(self, questions: Sequence[str]) -> list[Any]:
        """In their order; where errors.asked_to_stop, what is there by then."""
        self.ask(questions)
        keys = [self.digest(question) for question in questions]
        waiting = {self.pending[key] for key in keys if key in self.pending}
        while waiting and not errors.asked_to_stop:
            waiting = wait(waiting, timeout=0.2).not_done
        done = {
            key: self.pending.pop(key).result() for key in set(keys) if key in self.pending and self.pending[key].done()
        }
        return [self.known.get(key, done.get(key)) for key in keys]

    def digest(self, question: str) -> str:
        told = json.dumps([self.calls.model, question])  # ASCII: half a surrogate pair too
        return hashlib.sha256(told.encode()).hexdigest()

    def _serve(self) -> None:
        """A thread's life."""
        while True:
            key, question, future = self.queue.get()
            try:
                value = self._call(question)
                if value is not None:
                    self._keep(key, value)
                future.set_result(value)
            except BaseException as error:  # of _keep(): a full disk is the run's affair
                future.set_exception(error)

    def _call(self, question: str) -> Any:
        pause = self.calls.wait
        for turn in range(self.calls.tries):
            if errors.asked_to_stop:
                break
            with self.lock:
                self.made, self.retried = self.made + 1, self.retried + (turn > 0)
            try:
                return self._try(question)
            except Refused as error:
                self.why = str(error)
                break
            except Again as error:
                self.why = str(error)
                until = time.monotonic() + min(max(pause, error.after), LONGEST_WAIT)
                while turn + 1 < self.calls.tries and time.monotonic() < until and not errors.asked_to_stop:
                    time.sleep(min(0.2, max(until - time.monotonic(), 0)))
                pause *= 2
        return None

    def _try(self, question: str) -> Any:
        content = {"model": self.calls.model, "messages": [{"role": "user", "content": question}]}
        content |= {"temperature": 0, "seed": 0, "max_tokens": self.calls.tokens}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(content).encode(), headers)
        limit = f"no whole reply within {self.calls.timeout:g} s"
        try:
            body = self._fetch(request, limit)
        except urllib.error.HTTPError as error:
            error.close()
            said = f"status {error.code}{HINTS.get(error.code, '')}"
            if error.code in AGAIN:
                raise Again(said, seconds(error.headers.get("Retry-After"))) from None
            raise Refused(said) from None
        except Again:
            raise
        except Exception as error:  # of sockets, TLS and http.client, each with its own kinds
            cause = getattr(error, "reason", error)
            said = limit if isinstance(cause, TimeoutError) else f"no connection ({type(cause).__name__})"
            raise Again(said) from None
        try:
            choice = json.loads(body)["choices"][0]
            text, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise Again("a reply that is no chat completion") from None
        try:
            return self.read(text)
        except Again as error:
            raise Again(f"{error}, cut off: tokens= is how long it may be" if cut else str(error)) from None

    def _fetch(self, request: urllib.request.Request, limit: str) -> bytes:
        ends, body = time.monotonic() + self.calls.timeout, b""
        with self.open(request, timeout=self.calls.timeout) as reply:
            while part := reply.read1(2**16):  # a server may send a byte a second, each of them in time
                body += part
                if time.monotonic() > ends:
                    raise Again(limit)
                if len(body) > MOST_BYTES:
                    raise Again(f"a reply of more than {MOST_BYTES} bytes")
        return body

    def _keep(self, key: str, value: Any) -> None:
        with self.lock:
            self.known[key] = value
            if self.folder is None:
                return
            if self.file is None:  # not before: a run that is refused leaves nothing behind
                self.file = open(cache_file(self.folder), "a", encoding="utf-8")
            print(json.dumps({"key": key, "value": value}), file=self.file, flush=True)


class Unmoved(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):  # None: the redirect is an HTTPError
        return None


def seconds(value: str | None) -> float:
    """Of a Retry-After: a number, or a date; 0 where it is neither."""
    try:
        return max(float(value or 0), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return 0.0


def check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) and url.isprintable()
    except ValueError:
        fine = False
    if not fine or " " in url or "@" in url or "?" in url or "#" in url:  # not repeated: a key may be in it
        form = "http://HOST:PORT/PATH, as http://127.0.0.1:8000/v1, without user, password, ? and #"
        raise InputError(f"--judge: the endpoint must be {form}; a key belongs into an environment variable, key=NAME")


def cache_file(folder: Path) -> Path:
    return folder / f"judge-{ranks.rank}.jsonl"


def read_cache(folder: Path | None, read_saved: Callable[[Any], Any]) -> dict[str, Any]:
    """What judge-*.jsonl of all ranks have, this one's before the others'. A last line that a kill cut off is dropped.
    InputError for any other that is wrong."""
    known: dict[str, Any] = {}
    files = folder.glob("judge-*.jsonl") if folder and folder.is_dir() else ()
    for file in sorted(files, key=lambda file: (file == cache_file(folder), file.name)):
        text = read_text(file, "remove it, and all is asked again", 2**31)
        whole, _, rest = text.rpartition("\n")
        if rest and file == cache_file(folder):
            os.truncate(file, file.stat().st_size - len(rest.encode()))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                known[str(row["key"])] = read_saved(row["value"])
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                raise InputError(f"{one_line(file)}:{number}: is no line of this version's; delete it") from None
    return known
