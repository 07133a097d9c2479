"""Fetching a repository from the hub: a local HTTP server serves files as the real one does."""

import ast
import fnmatch
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from internlm3.runtime.common import hub as snapshots

COMMIT = "0" * 40
SMALL = ["config.json", "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
         "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "quantize_config.json"]  # fmt: skip
# What trainers and other libraries leave beside a checkpoint.
CLUTTER = ["README.md", "checkpoint-500/config.json", "checkpoint-500/model.safetensors", "checkpoint-500/merges.txt",
           "adapter_model.safetensors", "adapter_config.json", "consolidated.safetensors", "consolidated.00.pth",
           "params.json", "training_args.bin", "optimizer.bin", "modeling_internlm3.py", "onnx/model.onnx",
           "model.fp16.safetensors", "tf_model.h5", "trainer_state.json", "original/tokenizer.model"]  # fmt: skip


def index_of(*shards: str) -> str:
    return json.dumps({"weight_map": {f"weight.{i}": shard for i, shard in enumerate(shards)}})


SAFE = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
PICKLED = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
GPTQ = ["gptq_model-4bit-128g-00001-of-00002.safetensors", "gptq_model-4bit-128g-00002-of-00002.safetensors"]
GPTQ_INDEX = "gptq_model-4bit-128g.safetensors.index.json"
SAFE_INDEX, PICKLED_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves a repository me/model with the content in `files`; `asked` has the names of the files fetched."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.cache = Path()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        files = self.server.files
        if not self.path.startswith(("/me/model", "/api/models/me/model")):
            return self.reply(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        if "elsewhere" in self.path:
            return self.reply(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        if self.path.startswith("/api/"):
            listing = [{"type": "file", "path": name, "size": len(content), "oid": digest(content)}
                       for name, content in files.items()]  # fmt: skip
            siblings = [{"rfilename": name} for name in files]
            info = {"id": "me/model", "modelId": "me/model", "sha": COMMIT, "siblings": siblings, "tags": [],
                    "private": False, "gated": False, "downloads": 0, "likes": 0}  # fmt: skip
            return self.reply(200, json.dumps(listing if "/tree/" in self.path else info).encode(), body)
        name = urllib.parse.unquote(re.sub(r"^/me/model/resolve/[^/]+/", "", self.path))
        if name not in files:
            return self.reply(404, b"", body, {"X-Error-Code": "EntryNotFound"})
        self.server.asked.append(name)
        self.reply(200, files[name], body, {"ETag": f'"{digest(files[name])}"', "X-Repo-Commit": COMMIT})

    def reply(self, status, content, body, headers=()):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(server, tmp_path):
    """The server with an empty repository, and an empty cache."""
    server.files.clear()
    server.asked.clear()
    server.cache = tmp_path
    return server


@pytest.fixture(scope="module")
def client(server):
    """A process that uses the server as its hub, and evaluates a line each time: (exception's name, text)."""
    loop = """
import sys
from internlm3.runtime.common.hub import locate
for line in sys.stdin:
    try:
        print(("", str(eval(line))), flush=True)
    except Exception as error:
        print((type(error).__name__, str(error)), flush=True)
"""
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", loop], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:

        def evaluate(line: str) -> tuple[str, str]:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return ast.literal_eval(process.stdout.readline())

        yield evaluate
        process.stdin.close()


def run(hub, code: str, **environment) -> subprocess.CompletedProcess:
    """A process with this hub in its environment, which the hub's library reads once."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub.cache), "HF_HUB_DISABLE_XET": "1", **environment}
    code = "from internlm3.runtime.common.hub import locate\n" + code
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def fetched(hub, client, **options) -> list[str]:
    """The files in the folder that `locate` returns."""
    failed, folder = client(f"locate('me/model', cache_dir={str(hub.cache)!r}, **{options!r})")
    assert not failed, folder
    return files_of(Path(folder))


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("weights", "read"),
    [
        ({"model.safetensors": "", **dict.fromkeys(PICKLED, ""), PICKLED_INDEX: index_of(*PICKLED)},
         ["model.safetensors"]),
        ({SAFE_INDEX: index_of(*SAFE, SAFE[0]), **dict.fromkeys(SAFE, ""), "pytorch_model.bin": "",
          "model-00001-of-00007.safetensors": ""}, [SAFE_INDEX, *SAFE]),
        ({"pytorch_model.bin": ""}, ["pytorch_model.bin"]),
        ({PICKLED_INDEX: index_of(*PICKLED), **dict.fromkeys(PICKLED, "")}, [PICKLED_INDEX, *PICKLED]),
        ({SAFE_INDEX: index_of("a[1].safetensors"), "a[1].safetensors": "", "a1.safetensors": ""},
         [SAFE_INDEX, "a[1].safetensors"]),
        ({SAFE_INDEX: index_of("../secret", "checkpoint-500/model.safetensors")}, [SAFE_INDEX]),
        ({"gptq_model-4bit-128g.safetensors": ""}, ["gptq_model-4bit-128g.safetensors"]),
        ({GPTQ_INDEX: index_of(*GPTQ), **dict.fromkeys(GPTQ, "")}, [GPTQ_INDEX, *GPTQ]),
        ({"gptq_model-4bit-128g.safetensors": "", "model.safetensors": ""}, ["model.safetensors"]),
        ({}, []),
    ],
    ids=["one file", "shards", "pickled", "pickled shards", "odd names", "paths", "GPTQ", "GPTQ shards", "2", "none"],
)  # fmt: skip
def test_what_is_read_is_fetched_and_nothing_else(hub, client, weights, read):
    hub.files |= dict.fromkeys([*SMALL, *CLUTTER], b"{}") | {name: text.encode() for name, text in weights.items()}
    assert fetched(hub, client) == sorted([*SMALL, *read])
    asked = set(hub.asked)
    assert asked == {*SMALL, *read}
    assert fetched(hub, client, local_files_only=True) == sorted([*SMALL, *read])


def test_the_small_files_alone(hub, client):
    hub.files |= dict.fromkeys([*SMALL, *CLUTTER, "model.safetensors", SAFE_INDEX], b"{}")
    assert fetched(hub, client, weights=False) == sorted(SMALL)


def test_every_file_that_is_read_is_on_the_list():
    """Every name of a checkpoint's file that occurs in the runtime is one that is fetched."""
    names: set[str] = set()
    for path in Path(snapshots.__file__).parents[1].rglob("*.py"):
        names |= set(re.findall(r'"([\w.]+\.(?:json|jinja|model|bin|safetensors))"', path.read_text(encoding="utf-8")))
    listed = {*snapshots.NOTES, *snapshots.TOKENIZER, *snapshots.WEIGHTS[0], *snapshots.WEIGHTS[1]}
    names.remove("tokenizer.ggml.model")  # a setting in GGUF files
    assert names >= {"config.json", "tokenizer.model"} and names <= listed
    assert not any(fnmatch.fnmatch(name, pattern) for name in CLUTTER for pattern in listed)


MISSING = "'me/model' is no local folder, and "


@pytest.mark.parametrize(
    ("name", "options", "begins", "contains"),
    [
        ("no-one/nothing", {}, "'no-one/nothing' is no local folder, and the hub has no repository", "HF_TOKEN"),
        ("me/model", {"revision": "elsewhere"}, MISSING + "its repository on the hub has no revision 'elsewhere'", ""),
        ("me/model", {"local_files_only": True}, MISSING + "nothing of it is in the cache", "may not be asked"),
    ],
)  # fmt: skip
def test_what_went_wrong(hub, client, name, options, begins, contains):
    error, text = client(f"locate({name!r}, cache_dir={str(hub.cache)!r}, **{options!r})")
    assert error == "FileNotFoundError" and text.startswith(begins) and contains in text and "\n" not in text


@pytest.mark.parametrize(
    ("call", "environment", "begins", "contains"),
    [
        ("locate('me/model')", {"HF_ENDPOINT": "http://127.0.0.1:9"}, MISSING + "the hub cannot be reached",
         "check the network, or set HF_ENDPOINT"),
        ("locate('me/model', revision='v1')", {"HF_HUB_OFFLINE": "1"},
         MISSING + "nothing of it at revision 'v1' is in the cache", "may not be asked"),
    ],
)  # fmt: skip
def test_what_went_wrong_by_the_environment(hub, call, environment, begins, contains):
    ran = run(hub, f"try: {call}\nexcept FileNotFoundError as error: print(error)", **environment)
    assert ran.stdout.startswith(begins) and contains in ran.stdout, ran.stdout + ran.stderr
    assert ran.stdout.count("\n") == 1


def test_no_bars_where_there_is_no_terminal(hub):
    hub.files |= dict.fromkeys(SMALL, b"{}")
    ran = run(hub, "print(locate('me/model', weights=False))")
    assert "%|" not in ran.stderr and ran.returncode == 0, ran.stderr
    folder = Path(ran.stdout.strip())
    assert files_of(folder) == sorted(SMALL) and hub.cache in folder.parents  # that of HF_HOME


@pytest.mark.skipif(os.name != "posix", reason="a terminal of one's own is POSIX's")
@pytest.mark.parametrize("progress", [True, False])
def test_bars_on_a_terminal(hub, progress):
    import fcntl
    import pty
    import termios

    hub.files |= dict.fromkeys(SMALL, b"{}")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    code = f"from internlm3.runtime.common.hub import locate\nlocate('me/model', progress={progress})"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(hub.cache), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", code], stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert done.returncode == 0, shown
    assert (b"%|" in shown) is progress
