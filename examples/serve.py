"""Serve many adapters on one base model over HTTP: requests that wait are answered in one mixed batch. See docs/serving.md.

    python examples/serve.py adapters/reviews adapters/headlines [--generator cond-pdiff/minilm-text-tasks] [--port 8000]

It needs nothing but this package and the standard library. It has no passwords and no encryption, and listens on this machine alone unless
`--host` says otherwise: put a proxy with both in front of it before others can reach it.
"""

from __future__ import annotations

import argparse
import json
import queue
import re
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch

from cond_pdiff import AdapterPool, CondPDiffError, CondPDiffPipeline, LoraAdapter, Request, TaskPrompt
from cond_pdiff.hub import Backbone
from cond_pdiff.mixed_batch import Answer

MAX_BODY = 64 * 1024
"""The most bytes of a request's body."""
MAX_TOKENS = 256
"""The most tokens of an answer that is written: a batch lasts as long as its longest answer."""
IDLE_SECONDS = 30
"""How long a connection may say nothing."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What an adapter may be called."""


class Refusal(Exception):
    """A request that is not answered, with its HTTP status and what to do about it."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """The limits of a server: rows of a batch, requests that may wait, seconds to wait for others, and adapters in memory."""

    batch: int = 16
    waiting: int = 256
    wait: float = 0.005
    adapters: int = 64


@dataclass(frozen=True)
class Waiting:
    """A request that waits for its batch."""

    ready: Any
    answer: Future[tuple[Answer, int]] = field(default_factory=Future)


class Batcher:
    """A thread that takes what waits, at most so many requests, and has the pool answer it in one batch."""

    def __init__(self, pool: AdapterPool[Any, Any], limits: Limits) -> None:
        self.pool, self.limits = pool, limits
        self._queue: queue.Queue[Waiting] = queue.Queue(limits.waiting)
        threading.Thread(target=self._run, daemon=True, name="batcher").start()

    def ask(self, request: Request) -> tuple[Answer, int]:
        """Return the answer and the number of requests in its batch.

        Raises:
            CondPDiffError: see `AdapterPool.answer`.
            Refusal: too many requests wait.
        """
        waiting = Waiting(self.pool.ready(request))
        try:
            self._queue.put_nowait(waiting)
        except queue.Full:
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, f"{self.limits.waiting} requests are waiting; try again in a moment") from None
        return waiting.answer.result()

    def _run(self) -> None:
        while True:
            batch = self._collected()
            try:
                answers = self.pool.answer_ready([waiting.ready for waiting in batch])
            except Exception as error:  # the requests were checked, so it is the machine (no memory left …); the next batch may go well
                for waiting in batch:
                    waiting.answer.set_exception(error)
                continue
            for waiting, answer in zip(batch, answers, strict=True):
                waiting.answer.set_result((answer, len(batch)))

    def _collected(self) -> list[Waiting]:
        """Wait for a request, and a moment longer for others."""
        batch = [self._queue.get()]
        end = time.monotonic() + self.limits.wait
        while len(batch) < self.limits.batch:
            try:
                batch.append(self._queue.get(timeout=max(0.0, end - time.monotonic())))
            except queue.Empty:
                break
        return batch


class Service:
    """What the server does: it knows nothing of HTTP but statuses.

    Args:
        pool: the adapters.
        limits: see `Limits`.
        generator: makes adapters from descriptions, for the pool's base model; None: only those that are there are served.
    """

    def __init__(self, pool: AdapterPool[Any, Any], limits: Limits, generator: CondPDiffPipeline | None = None) -> None:
        self.pool, self.limits, self.generator = pool, limits, generator
        self._batcher = Batcher(pool, limits)
        self._making = threading.Lock()

    def adapters(self) -> dict[str, Any]:
        """Tell which adapters there are."""
        return {"adapters": {name: self._facts(adapter) for name, adapter in self.pool.adapters.items()}}

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a text with an adapter."""
        name, text, most = _entries(body, {"adapter": str, "text": (str, list)}, {"max_tokens": int}, {"max_tokens": 64})
        self._check_known(name)
        if not 1 <= most <= MAX_TOKENS:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"max_tokens must be from 1 to {MAX_TOKENS}, got {most}")
        answer, batch = self._batcher.ask(Request(name, tuple(text) if isinstance(text, list) else text, most))
        facts = {"adapter": name, "answer": answer.answer, "complete": answer.complete, "batch": batch}
        return {**facts, "probabilities": dict(answer.probabilities)} if answer.probabilities else facts

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """Make an adapter from a description, and serve it under a name."""
        if self.generator is None:
            raise Refusal(HTTPStatus.BAD_REQUEST, "this server makes no adapters: start it with --generator NAME")
        optional: dict[str, Any] = {"examples": list, "labels": list, "free": bool, "seed": int}
        wanted = _entries(body, {"name": str, "description": str}, optional, {"examples": [], "labels": [], "free": False, "seed": 0})
        name, description, examples, labels, free, seed = wanted
        if not NAME.fullmatch(name):
            raise Refusal(HTTPStatus.BAD_REQUEST, f"a name is letters, digits, dots, dashes and underscores, at most 64; got {name!r:.80}")
        if not 0 <= seed < 2**63:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"seed must be a whole number from 0 below 2^63, got {seed}")
        prompt = TaskPrompt.from_json({"description": description, "examples": examples, "labels": labels, "free": free})
        with self._making:  # one at a time, also so that the number of adapters is kept
            if name in self.pool.adapters:
                raise Refusal(HTTPStatus.CONFLICT, f"there is an adapter {name!r} already; DELETE /adapters/{name} first")
            if len(self.pool.adapters) >= self.limits.adapters:
                raise Refusal(HTTPStatus.CONFLICT, f"there are {self.limits.adapters} adapters, the most this server keeps; delete one")
            out = self.generator(prompt, num_adapters=4 if examples else 1, generator=torch.Generator().manual_seed(seed))
            self.pool.add(name, out.adapter)
        return {"name": name, **self._facts(out.adapter), "report": str(out.report)}

    def remove(self, name: str) -> dict[str, Any]:
        """Forget an adapter; its folder, if it has one, stays."""
        self._check_known(name)
        self.pool.remove(name)
        return {"removed": name}

    def _check_known(self, name: str) -> None:
        if name not in self.pool.adapters:
            raise Refusal(HTTPStatus.NOT_FOUND, f"there is no adapter {name!r:.80} here; GET /adapters tells which there are")

    @staticmethod
    def _facts(adapter: LoraAdapter) -> dict[str, Any]:
        return {"rank": adapter.spec.rank, "labels": list(adapter.metadata.get("labels") or ())}


def _entries(body: dict[str, Any], required: dict[str, Any], optional: dict[str, Any], defaults: dict[str, Any]) -> list[Any]:
    """Return a body's entries in order, of the types that they should have; `Refusal` otherwise."""
    kinds = {**required, **optional}
    if strange := sorted(set(body) - set(kinds)):
        raise Refusal(HTTPStatus.BAD_REQUEST, f"there is no entry {strange[0]!r:.80} in such a request; known are {', '.join(kinds)}")
    values = {**defaults, **body}
    for name, kind in kinds.items():
        if name not in values:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"the entry {name!r} is missing")
        if not isinstance(values[name], kind) or (kind is int and isinstance(values[name], bool)):
            wanted = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
            raise Refusal(HTTPStatus.BAD_REQUEST, f"{name!r} must be a {wanted}, got a {type(values[name]).__name__}")
    return [values[name] for name in kinds]


class Handler(BaseHTTPRequestHandler):
    """HTTP: JSON in, JSON out, `{"error": …}` where something is refused."""

    service: Service  # set by `make_server`
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        """Tell the adapters."""
        self._respond({"/adapters": lambda: (HTTPStatus.OK, self.service.adapters())})

    def do_POST(self) -> None:
        """Answer a text, or make an adapter."""
        self._respond({
            "/answer": lambda: (HTTPStatus.OK, self.service.answer(self._body())),
            "/adapters": lambda: (HTTPStatus.CREATED, self.service.generate(self._body())),
        })  # fmt: skip

    def do_PUT(self) -> None:
        """Refuse."""
        self._respond({})

    do_PATCH = do_PUT

    def do_DELETE(self) -> None:
        """Forget an adapter."""
        place, _, name = self.path.rpartition("/")
        self._respond({self.path: lambda: (HTTPStatus.OK, self.service.remove(unquote(name)))} if place == "/adapters" else {})

    def _respond(self, routes: dict[str, Any]) -> None:
        try:
            if self.path not in routes:
                status = HTTPStatus.METHOD_NOT_ALLOWED if self.path in ("/adapters", "/answer") else HTTPStatus.NOT_FOUND
                raise Refusal(status, "there are GET /adapters, POST /adapters, DELETE /adapters/NAME and POST /answer")
            status, facts = routes[self.path]()
        except Refusal as refusal:
            status, facts = refusal.status, {"error": str(refusal)}
        except CondPDiffError as error:
            status, facts = HTTPStatus.BAD_REQUEST, {"error": str(error)}
        except Exception as error:
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            status, facts = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "something went wrong here; the server's log says what"}
        written = json.dumps(facts).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(written)))
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", "1")
        if status >= HTTPStatus.BAD_REQUEST:  # a body may not have been read
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(written)

    def _body(self) -> dict[str, Any]:
        """Read a JSON object. Pages in a browser cannot send this type to another site unasked, so none can use a server it finds here."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "send a Content-Length")
        written = self.rfile.read(min(int(length), 4 * MAX_BODY))  # somewhat more, or the client would not hear why it is refused
        if len(written) > MAX_BODY:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {MAX_BODY} bytes, got {length}")
        if self.headers.get_content_type() != "application/json":
            raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send JSON, with the header Content-Type: application/json")
        try:
            body = json.loads(written)
        except (ValueError, RecursionError) as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise Refusal(HTTPStatus.BAD_REQUEST, f"the body must be a JSON object, got a {type(body).__name__}")
        return body

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""


def make_server(service: Service, host: str, port: int) -> ThreadingHTTPServer:
    """Return a server that listens, for `serve_forever`; port 0 takes a free one."""
    return ThreadingHTTPServer((host, port), type("ServiceHandler", (Handler,), {"service": service}))


def load(folders: Sequence[str], generator: str | None, base: str | None) -> tuple[AdapterPool[Any, Any], CondPDiffPipeline | None]:
    """Load adapters by the names of their folders, and a generator, whose base model they share."""
    names = [Path(folder).name for folder in folders]
    if twice := {name for name in names if names.count(name) > 1}:
        raise CondPDiffError(f"two adapters are called {min(twice)!r}; rename a folder")
    if generator is None:
        return AdapterPool.load(dict(zip(names, folders, strict=True)), base), None
    pipe = CondPDiffPipeline.from_pretrained(generator)
    pipe.set_progress_bar_config(disable=True)
    model = pipe.family.load(Backbone(base), pipe.template.spec) if base else pipe.base_model()
    pool = pipe.family.pool(model)
    for name, folder in zip(names, folders, strict=True):
        pool.add(name, LoraAdapter.load(folder))
    return pool, pipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="*", metavar="ADAPTER", help="adapter folders of one base model; served by the folders' names")
    parser.add_argument("--generator", help="makes adapters on request (POST /adapters): a folder, or a name such as cond-pdiff/…")
    parser.add_argument("--base", help="folder with the base model (default: found by the recorded reference)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one")
    parser.add_argument("--max-batch", type=int, default=Limits.batch, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--max-waiting", type=int, default=Limits.waiting, help="requests that may wait (default: %(default)s)")
    parser.add_argument("--wait", type=float, default=Limits.wait, help="seconds to wait for others (default: %(default)s)")
    parser.add_argument("--max-adapters", type=int, default=Limits.adapters, help="adapters in memory (default: %(default)s)")
    given = parser.parse_args(arguments)
    if min(given.max_batch, given.max_waiting, given.max_adapters) < 1 or not 0 <= given.wait <= 10:
        parser.error("--max-batch, --max-waiting and --max-adapters are at least 1, --wait is 0 to 10 seconds")
    try:
        pool, generator = load(given.adapters, given.generator, given.base)
    except CondPDiffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    limits = Limits(given.max_batch, given.max_waiting, given.wait, max(given.max_adapters, len(pool.adapters)))
    with make_server(Service(pool, limits, generator), given.host, given.port) as server:
        print(f"{len(pool.adapters)} adapters at http://{given.host}:{server.server_address[1]}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
