"""The example server: answers of mixed batches over HTTP, refusals, adapters made on request; docs/serving.md."""

from __future__ import annotations

import http.client
import importlib.util
import json
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_adapter
from test_mixed_batch import random_adapter
from tiny_language_models import LINEARS, save_llama

from cond_pdiff import AdapterPool, CondPDiffPipeline, LoraAdapter, Request
from cond_pdiff.cli import main
from cond_pdiff.hub import Backbone
from cond_pdiff.locks import lock_of
from cond_pdiff.models.causal_backbone import CausalBackbone

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.replace("\\\n", " ").splitlines() if line.strip()
]
RESULTS = json.loads((ROOT / "results" / "serving.json").read_text(encoding="utf-8"))


def module_at(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem + "_of_" + path.parent.name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


serve = module_at(ROOT / "examples" / "serve.py")


class Client:
    """Requests to a server on the loopback."""

    def __init__(self, port: int) -> None:
        self.port = port

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        written = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, written, {"Content-Type": "application/json", **named})
        response = connection.getresponse()
        found = response.status, json.loads(response.read())
        connection.close()
        return found


@pytest.fixture
def started() -> Iterator[Any]:
    servers = []

    def start(pool: AdapterPool[Any, Any], generator: CondPDiffPipeline | None = None, **limits: Any) -> Client:
        server = serve.make_server(serve.Service(pool, serve.Limits(**limits), generator), "127.0.0.1", 0)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return Client(server.server_address[1])

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def classifiers(tiny_backbone: Backbone, sentence_backbone: Any, tmp_path: Path) -> AdapterPool[Any, Any]:
    folders = {}
    for seed in range(5):
        adapter = make_adapter(sentence_backbone.model, tiny_backbone.repo_id, seed)
        folders[f"a{seed}"] = adapter.save(tmp_path / f"a{seed}")
    return AdapterPool.load(folders)


TEXTS = ["the good film", "the awful meal and the poor song", "a kitten", "lovely"]


def test_concurrent_requests_share_batches(started: Any, classifiers: AdapterPool[Any, Any]) -> None:
    client = started(classifiers, wait=0.3)
    asked = [(f"a{seed}", text) for seed in range(5) for text in TEXTS]
    with ThreadPoolExecutor(len(asked)) as threads:
        found = list(threads.map(lambda pair: client("POST", "/answer", {"adapter": pair[0], "text": pair[1]}), asked))
    for (name, text), (status, facts) in zip(asked, found, strict=True):
        (alone,) = classifiers.answer([Request(name, text)])
        assert (status, facts["adapter"], facts["answer"], facts["complete"]) == (200, name, alone.answer, True)
        assert facts["probabilities"] == pytest.approx(dict(alone.probabilities), abs=1e-5)
    assert 1 < max(facts["batch"] for _, facts in found) <= 16
    assert client("POST", "/answer", {"adapter": "a0", "text": ["a film", "a meal"]})[0] == 200


def test_a_language_model_writes(started: Any, tmp_path: Path) -> None:
    base = CausalBackbone.load(Backbone(str(save_llama(tmp_path / "base"))))
    folders = {}
    for seed, labels in enumerate(([], [], ["left", "right"])):
        facts = {"labels": labels, "description": f"Do {seed}."}
        adapter = random_adapter(base.model, str(tmp_path / "base"), LINEARS["llama"], 2 + seed, "CAUSAL_LM", seed, **facts)
        folders[f"w{seed}"] = adapter.save(tmp_path / f"w{seed}")
    pool = AdapterPool.load(folders)
    client = started(pool, wait=0.3)
    asked = [(name, text) for name in folders for text in TEXTS[:2]]
    with ThreadPoolExecutor(len(asked)) as threads:
        found = list(threads.map(lambda pair: client("POST", "/answer", {"adapter": pair[0], "text": pair[1], "max_tokens": 5}), asked))
    for (name, text), (status, facts) in zip(asked, found, strict=True):
        (alone,) = pool.answer([Request(name, text, 5)])
        assert (status, facts["answer"], facts["complete"]) == (200, alone.answer, alone.complete)
    status, facts = client("POST", "/answer", {"adapter": "w0", "text": "word " * 200})
    assert (status, "of the model" in facts["error"]) == (400, True)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/answer", {"adapter": "nobody", "text": "x"}, 404, "no adapter 'nobody' here; GET /adapters"),
        ("POST", "/answer", {"adapter": "../a0", "text": "x"}, 404, "no adapter"),
        ("POST", "/answer", b'{"adapter": "a0", "text": ', 400, "not JSON"),
        ("POST", "/answer", b"\xff\xfe", 400, "not JSON"),
        ("POST", "/answer", b"[" * 50_000, 400, "not JSON"),
        ("POST", "/answer", [1], 400, "a JSON object, got a list"),
        ("POST", "/answer", {"adapter": "a0"}, 400, "'text' is missing"),
        ("POST", "/answer", {"adapter": "a0", "text": 3}, 400, "'text' must be a str or list, got a int"),
        ("POST", "/answer", {"adapter": "a0", "text": ["x"]}, 400, "a pair of strings"),
        ("POST", "/answer", {"adapter": "a0", "text": " "}, 400, "the text is empty"),
        ("POST", "/answer", b'{"adapter": "a0", "text": "\\ud800"}', 400, "lone surrogates"),
        ("POST", "/answer", {"adapter": "a0", "text": "x", "max_tokens": 0}, 400, "from 1 to 256"),
        ("POST", "/answer", {"adapter": "a0", "text": "x", "max_tokens": True}, 400, "must be a int, got a bool"),
        ("POST", "/answer", {"adapter": "a0", "text": "x", "scale": 2}, 400, "no entry 'scale'"),
        ("POST", "/answer", {"adapter": "a0", "text": "x" * 70_000}, 413, "at most 65536 bytes"),
        ("GET", "/answer", None, 405, "POST /answer"),
        ("PUT", "/adapters", {}, 405, "GET /adapters"),
        ("GET", "/etc/passwd", None, 404, "GET /adapters"),
        ("POST", "/adapters", {"name": "x", "description": "y"}, 400, "start it with --generator"),
        ("DELETE", "/adapters/nobody", None, 404, "no adapter 'nobody'"),
        ("DELETE", "/other/a0", None, 404, "DELETE /adapters/NAME"),
    ],
)
def test_what_is_wrong_is_refused(
    method: str, path: str, body: Any, status: int, message: str, started: Any, classifiers: AdapterPool[Any, Any]
) -> None:
    client = started(classifiers)
    found, facts = client(method, path, body)
    assert (found, list(facts)) == (status, ["error"])
    assert message in facts["error"]
    assert client("POST", "/answer", {"adapter": "a0", "text": "x"})[0] == 200  # and it goes on


def test_headers_are_asked_for(started: Any, classifiers: AdapterPool[Any, Any]) -> None:
    client = started(classifiers)
    assert client("POST", "/answer", {"adapter": "a0", "text": "x"}, Content_Type="text/plain")[0] == 415
    with socket.create_connection(("127.0.0.1", client.port), timeout=60) as raw:
        raw.sendall(b"POST /answer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\r\n")
        assert b" 411 " in raw.recv(100)


def test_too_many_waiting_requests_are_refused(started: Any, classifiers: AdapterPool[Any, Any]) -> None:
    client = started(classifiers, batch=1, waiting=1, wait=0.0)
    with ThreadPoolExecutor(6) as threads, lock_of(classifiers.base.model):  # nothing is answered meanwhile
        found = [threads.submit(client, "POST", "/answer", {"adapter": "a0", "text": "x"}) for _ in range(6)]
        while sum(each.done() for each in found) < 4:
            time.sleep(0.01)
        refused = [each.result() for each in found if each.done()]
    assert {status for status, _ in refused} == {503}
    assert [each.result()[0] for each in found].count(200) in (1, 2)  # one in the batch and one that waits, unless it was not yet taken


def test_adapters_are_made_on_request(started: Any, pipe: CondPDiffPipeline) -> None:
    pool = pipe.family.pool(pipe.base_model())
    client = started(pool, pipe, adapters=2)
    examples = [["the good film", "positive"], ["the awful meal", "negative"]]
    asked = {"name": "kind", "description": "Is the remark kind?", "examples": examples}
    status, facts = client("POST", "/adapters", asked)
    assert (status, facts["name"], facts["labels"]) == (201, "kind", ["positive", "negative"])
    assert facts["report"].startswith("request")
    assert client("GET", "/adapters") == (200, {"adapters": {"kind": {"rank": 2, "labels": ["positive", "negative"]}}})
    assert client("POST", "/answer", {"adapter": "kind", "text": "the lovely room"})[1]["answer"] in facts["labels"]
    assert client("POST", "/adapters", asked)[0] == 409
    assert client("POST", "/adapters", {**asked, "name": "../kind"})[0] == 400
    assert client("POST", "/adapters", {**asked, "examples": [["x"]]})[0] == 400
    assert client("POST", "/adapters", {**asked, "seed": -1})[0] == 400
    assert client("POST", "/adapters", {"name": "two", "description": "Which?", "labels": ["cat", "dog"]})[0] == 201
    assert "the most this server keeps" in client("POST", "/adapters", {**asked, "name": "three"})[1]["error"]
    assert client("DELETE", "/adapters/kind") == (200, {"removed": "kind"})
    assert client("POST", "/answer", {"adapter": "kind", "text": "x"})[0] == 404


def test_the_command_refuses_what_it_cannot_serve(tmp_path: Path, tiny_adapter: LoraAdapter, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("one/same", "two/same"):
        tiny_adapter.save(tmp_path / folder)
    assert serve.main([str(tmp_path / "one" / "same"), str(tmp_path / "two" / "same")]) == 1
    assert serve.main([str(tmp_path / "nothing")]) == 1
    assert serve.main([]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "error: two adapters are called 'same'; rename a folder"
    assert all(line.startswith("error: ") for line in told)
    with pytest.raises(SystemExit):
        serve.main(["--max-batch", "0"])


# --- the page ----------------------------------------------------------------------------------------------------------------


def test_the_pages_table_is_the_measured_one() -> None:
    assert module_at(ROOT / "benchmarks" / "serving.py").table(RESULTS) in PAGE


def curl(client: Client, line: str) -> Any:
    """What a command line of curl would get."""
    words = shlex.split(line)[1:]
    options = dict(zip(words[:-1:2], words[1:-1:2], strict=True))
    assert set(options) <= {"-H", "-d", "-X"}, options
    path = words[-1].removeprefix("http://127.0.0.1:8000")
    body = options["-d"].encode() if "-d" in options else None
    assert body is None or options["-H"] == "Content-Type: application/json"
    status, facts = client(options.get("-X", "POST" if body else "GET"), path, body)
    assert status in (200, 201), facts
    return facts


def test_the_pages_commands_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = [shlex.split(line)[1:] for line in COMMANDS if line.startswith("cond-pdiff generate")]
    assert len(made) == 2
    for command in made:
        assert main(command) == 0
    (start,) = (shlex.split(line) for line in COMMANDS if line.startswith("python examples/serve.py"))
    command = [sys.executable, str(ROOT / start[1]), *start[2:], "--port", "0", "--wait", "0.3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            told = server.stdout.readline()
            assert told.startswith("2 adapters at http://127.0.0.1:")
            client = Client(int(told.rpartition(":")[2]))
            asked = [line for line in COMMANDS if line.startswith("curl ")]
            assert len(asked) >= 5
            answers = [line for line in asked if "/answer" in line]
            with ThreadPoolExecutor(2) as threads:  # mixed: the two adapters at once
                first, second = threads.map(lambda line: curl(client, line), answers[:2])
            assert (first["answer"], second["answer"]) == ("negative", "sports")
            for line in asked:
                curl(client, line)
        finally:
            server.terminate()


def test_the_pages_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for line in COMMANDS:
        if line.startswith("cond-pdiff generate"):
            assert main(shlex.split(line)[1:]) == 0
    capsys.readouterr()
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, "serving.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[0] == "['negative', 'sports']"
