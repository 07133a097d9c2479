"""Load on one server: 16 clients with random lengths, of which some cancel, read slowly, or cut the connection."""

import asyncio
import json
import random

import httpx
import pytest

from internlm3 import LLM, AsyncLLM
from internlm3.tests.server.conftest import idle, running

CLIENTS, REQUESTS = 16, 3  # of each client
PATH = "/v1/completions"
WORDS = ["the", "sea", "今天", "def", "return", "village", "上海", "water", "once", "upon"]


@pytest.fixture(scope="module")
def llm(make):
    """In bfloat16, where a CPU's results are bit-identical alone and in a batch."""
    return LLM(
        make(max_position_embeddings=256, num_hidden_layers=1), dtype="bfloat16", progress=False, max_batch_size=8
    )


def test_every_stream_that_finishes_is_what_it_is_alone(llm):
    random_ = random.Random(0)
    jobs = [
        {
            "fields": {
                "prompt": " ".join(
                    random_.choices(WORDS, k=random_.randint(1, 20))
                ),  # less than a page, so that none is reused
                "max_tokens": random_.randint(1, 40),
                "temperature": 0.9,
                "seed": number,
                "ignore_eos": True,
                "stream": True,
            },
            "kind": random_.choice(["reads", "reads", "reads slowly", "cancels", "cuts", "asks wrongly"]),
            "after": random_.randint(0, 10),
        }
        for number in range(CLIENTS * REQUESTS)
    ]

    async def ask(client, port, job):
        """The text of a stream; None if it was not read to its end."""
        fields, kind = job["fields"], job["kind"]
        if kind == "asks wrongly":
            response = await client.post(PATH, json={**fields, "temperature": -1})
            assert response.status_code == 400
            return None
        if kind == "cuts":
            body = json.dumps(fields).encode()
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            lines = [f"POST {PATH} HTTP/1.1", "host: localhost", "content-type: application/json"]
            head = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""])
            writer.write(head.encode() + body)
            await asyncio.sleep(0.002 * job["after"])
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
                if kind == "reads slowly":
                    await asyncio.sleep(0.003)
                if kind == "cancels" and count > job["after"]:
                    return None
        raise AssertionError("the stream has no end")

    async def main():
        async with running(AsyncLLM(llm)) as (server, port):
            limits = httpx.Limits(max_connections=CLIENTS)
            url = f"http://localhost:{port}"
            async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:

                async def series(number):
                    return [await ask(client, port, job) for job in jobs[number::CLIENTS]]

                answers = await asyncio.gather(*map(series, range(CLIENTS)))
            while not idle(llm) or server.service.active:
                await asyncio.sleep(0.001)
            return [answers[number % CLIENTS][number // CLIENTS] for number in range(len(jobs))]

    answers = asyncio.run(main())
    finished = 0
    for job, text in zip(jobs, answers, strict=True):
        if job["kind"] in ("reads", "reads slowly"):
            assert text is not None
        if text is not None:
            finished += 1
            settings = {name: value for name, value in job["fields"].items() if name not in ("prompt", "stream")}
            assert text == llm.generate(job["fields"]["prompt"], **settings).text
    assert finished >= 15
    assert idle(llm)
