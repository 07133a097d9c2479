"""Clients that ask one server for streams at the same time; some cancel, read slowly, or cut the connection."""

import asyncio
import json
import random
from dataclasses import dataclass
from typing import Any

import httpx

from internlm3 import LLM

PATH = "/v1/completions"
WORDS = ["the", "sea", "今天", "def", "return", "village", "上海", "water", "once", "upon"]
KINDS = ["reads", "reads", "reads slowly", "cancels", "cuts", "asks wrongly"]


@dataclass(frozen=True)
class Job:
    """One request, and what its client does.

    Attributes:
        after: when it cancels, in pieces of text, or cuts, in steps of 2 ms.
    """

    fields: dict[str, Any]
    kind: str
    after: int


def random_jobs(count: int, requests: int) -> list[Job]:
    """Jobs with `requests` different requests, whose prompts have less than a page, so that none is reused."""
    rng = random.Random(0)
    each = [
        {
            "prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, 20))),
            "max_tokens": rng.randint(1, 40),
            "temperature": 0.9,
            "seed": number,
            "ignore_eos": True,
        }
        for number in range(requests)
    ]
    return [Job(each[number % requests], rng.choice(KINDS), rng.randint(0, 10)) for number in range(count)]


async def load(port: int, jobs: list[Job], clients: int) -> list[str | None]:
    """What each job's client has read at the end of its stream; None if it did not read to the end."""
    answers: list[str | None] = [None] * len(jobs)
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=f"http://localhost:{port}", timeout=None, limits=limits) as client:

        async def series(first: int) -> None:
            for number in range(first, len(jobs), clients):
                answers[number] = await _ask(client, port, jobs[number])

        await asyncio.gather(*map(series, range(clients)))
    return answers


async def _ask(client: httpx.AsyncClient, port: int, job: Job) -> str | None:
    fields = {**job.fields, "stream": True}
    if job.kind == "asks wrongly":
        response = await client.post(PATH, json={**fields, "temperature": -1})
        assert response.status_code == 400
        return None
    if job.kind == "cuts":
        body = json.dumps(fields).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        lines = [f"POST {PATH} HTTP/1.1", "host: localhost", "content-type: application/json"]
        writer.write("\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body)
        await asyncio.sleep(0.002 * job.after)
        writer.transport.abort()
        return None
    text, count = "", 0
    async with client.stream("POST", PATH, json=fields) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return text
            if line:
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                count += 1
            if job.kind == "reads slowly":
                await asyncio.sleep(0.003)
            if job.kind == "cancels" and count > job.after:
                return None
    raise AssertionError("the stream has no end")


def check(llm: LLM, jobs: list[Job], answers: list[str | None]) -> int:
    """Fails unless every stream that was read to its end is what it is alone. Returns how many these are."""
    alone: dict[int, str] = {}
    for job, text in zip(jobs, answers, strict=True):
        if text is None:
            assert job.kind not in ("reads", "reads slowly"), "a stream was lost"
            continue
        seed = job.fields["seed"]
        if seed not in alone:
            alone[seed] = llm.generate(
                **{"prompts" if name == "prompt" else name: v for name, v in job.fields.items()}
            ).text
        assert text == alone[seed]
    return sum(text is not None for text in answers)
