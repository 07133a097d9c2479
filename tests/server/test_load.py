"""Load on one server: 16 clients with random lengths, of which some cancel, read slowly, or cut the connection.

tests/serving has four times as many, and for longer.
"""

import asyncio

import pytest

from internlm3 import LLM, AsyncLLM
from internlm3.tests.server.conftest import idle, running
from internlm3.tests.support.load import check, load, random_jobs

CLIENTS, REQUESTS = 16, 3  # of each client


@pytest.fixture(scope="module")
def llm(make):
    """In bfloat16, where a CPU's results are bit-identical alone and in a batch."""
    return LLM(
        make(max_position_embeddings=256, num_hidden_layers=1), dtype="bfloat16", progress=False, max_batch_size=8
    )


def test_every_stream_that_finishes_is_what_it_is_alone(llm):
    jobs = random_jobs(CLIENTS * REQUESTS, CLIENTS * REQUESTS)

    async def main():
        async with running(AsyncLLM(llm)) as (server, port):
            answers = await load(port, jobs, CLIENTS)
            while not idle(llm) or server.service.active:
                await asyncio.sleep(0.001)
            return answers

    assert check(llm, jobs, asyncio.run(main())) >= 15
    assert idle(llm)
