"""`internlm3 serve` under load, next to `transformers serve` with the same model, on this machine's CPU.

    python -m bench.serving [--clients 1 4 16] [--tokens 32] [--rounds 3] [--json FILE]

Each is asked as it comes and in a second way: `internlm3 serve` behind an ingress, with one replica (needs the extra
`ray`), and `transformers serve` with continuous batching (both need the package accelerate). They serve the demo model
from processes of their own, and are asked in turns (A B C D A B ...): that many clients at a time stream one chat
answer each, over loopback. Printed are the median and the 95th and 99th percentile of the time to the first piece of
text and of the time between two of them, and tokens a second of all clients together. A piece is a token or more. A
server that does not start is named with its reason.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from .options import output, positive
from .record import Part, Record, Row, stamp

TOPICS = ("the sea", "a lighthouse", "winter", "a train", "a garden", "the moon", "a river", "bread")
PATIENCE = 300  # seconds for a server to start


@dataclass(frozen=True)
class Load:
    """One round of one server: seconds, and tokens a second."""

    first: list[float]
    between: list[float]
    rate: float


OURS = [sys.executable, "-m", "internlm3", "serve"]
PEER = [str(Path(sys.executable).with_name("transformers")), "serve"]
SERVERS = {
    "internlm3": OURS,
    "internlm3, 1 replica": [*OURS, "--replicas", "1"],
    "transformers": PEER,
    "transformers, continuous batching": [*PEER, "--continuous-batching"],
}


def commands(folder: Path, place: Path) -> dict[str, list[str]]:
    """How each server is started. Each serves the model under the path of a folder in `place`, of the server's name."""
    found = {}
    for name, command in SERVERS.items():
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        own = place / name
        own.mkdir()
        for file in folder.iterdir():
            (own / file.name).symlink_to(file)
        found[name] = [*command, str(own), "--port", port, "--device", "cpu", "--dtype", "float32"]
        if name.startswith("internlm3"):
            found[name] += ["--served-model-name", str(own)]
            continue
        # transformers serve looks up the class that config.json names, and its name for this one is Llama's.
        config = own / "config.json"
        values = json.loads(config.read_text()) | {"architectures": ["LlamaForCausalLM"]}
        config.unlink()
        config.write_text(json.dumps(values))
    return found


@contextlib.contextmanager
def started(command: Sequence[str]) -> Iterator[str]:
    """Runs a server. Yields its address; raises RuntimeError with its last line if it does not start."""
    url = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
    variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while not _healthy(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    said = process.communicate()[0].decode(errors="replace") if process.poll() is not None else ""
                    raise RuntimeError(f"it did not start: {' '.join(said.split())[-200:]}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            try:
                process.communicate(timeout=PATIENCE)
            finally:
                process.kill()


def _healthy(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health").status_code == 200
    return False


async def load(url: str, model: str, clients: int, tokens: int) -> Load:
    """`clients` answers at a time, one each."""
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        begun = time.perf_counter()
        streams = await asyncio.gather(*(_stream(client, model, number, tokens) for number in range(clients)))
        seconds = time.perf_counter() - begun
    gaps = [after - before for times, _ in streams for before, after in itertools.pairwise(times[1:])]
    return Load([times[1] - times[0] for times, _ in streams], gaps, sum(count for _, count in streams) / seconds)


async def _stream(client: httpx.AsyncClient, model: str, number: int, tokens: int) -> tuple[list[float], int]:
    """The times of the request and of each piece of text, and the number of tokens."""
    question = f"Write a long story about {TOPICS[number % len(TOPICS)]}, number {number}."
    asked: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": question}]}
    asked |= {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": tokens}
    times, count = [time.perf_counter()], 0
    async with client.stream("POST", "/v1/chat/completions", json=asked) as response:
        async for line in response.aiter_lines():
            if response.status_code != 200:
                raise RuntimeError(line[:200])
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if any(choice["delta"].get("content") for choice in event.get("choices", ())):
                times.append(time.perf_counter())
            count = (event.get("usage") or {}).get("completion_tokens", count)
    if len(times) == 1:
        raise RuntimeError("an answer has no text")
    return times, count or len(times) - 1


def rows(part: Part, folder: Path, clients: Sequence[int], tokens: int, rounds: int) -> Iterator[Row]:
    urls = {}
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as servers:
        for name, command in commands(folder, Path(place)).items():
            try:
                urls[name] = servers.enter_context(started(command))
                asyncio.run(load(urls[name], f"{place}/{name}", 1, 2))  # the first answer pays for more than itself
            except (OSError, RuntimeError, httpx.HTTPError) as error:
                urls.pop(name, None)
                yield part.missing(name, str(error))
        for count in clients:
            found: dict[str, list[Load]] = {name: [] for name in urls}
            for _ in range(rounds):
                for name, url in urls.items():
                    found[name].append(asyncio.run(load(url, f"{place}/{name}", count, tokens)))
            for name, loads in found.items():
                who = f"{name}, {count} at a time"
                yield _latency(part, f"{who}, first text", [each.first for each in loads])
                yield _latency(part, f"{who}, between texts", [each.between for each in loads])
                yield part.figure(f"{who}, all together", [each.rate for each in loads], "tokens/s")


def _latency(part: Part, name: str, rounds: list[list[float]]) -> Row:
    """The median of each round; the percentiles of all rounds together."""
    cuts = statistics.quantiles([second for each in rounds for second in each] * 2, n=100, method="inclusive")
    note = f"p95 {1e3 * cuts[94]:.1f} ms, p99 {1e3 * cuts[98]:.1f} ms"
    return part.figure(name, [1e3 * statistics.median(each) for each in rounds], "ms", note)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=positive, default=32, help="the longest answer")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--json", type=output, help="write the record: every round, the machine and the versions")
    args = parser.parse_args(arguments)
    from internlm3.runtime.checkpoint.demo_model import demo_model_checkpoint

    made, found = stamp(), []
    print("; ".join(f"{key} {value}" for key, value in made.items()))
    for row in rows(Part("serving"), demo_model_checkpoint(), args.clients, args.tokens, args.rounds):
        print(row, flush=True)
        found.append(row)
    if args.json:
        Record(made, found).save(args.json)


if __name__ == "__main__":
    main()
