"""Answers the requests of a batch on the machines of a Ray cluster: Ray Data hands them to replicas of the model."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import pyarrow
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from ..api.async_llm import AsyncLLM
from ..replicas.cluster import connect
from ..replicas.count import Count
from .answer import Answer, answer, app_for
from .request import BatchRequest


def answer_on_ray(
    options: dict[str, Any],
    name: str,
    count: Count,
    requests: Iterable[BatchRequest],
    write: Callable[[Answer], None],
) -> None:
    """Gives the answer to each request to `write`, in the order in which they are ready.

    The cluster is that of RAY_ADDRESS, or this machine alone. Each replica has a GPU of its own, where there are any,
    and else a core.

    Args:
        options: of LLM, for every replica; max_batch_size is one of them.
        name: the model's name in requests.
        requests: are read on this machine, one by one, by another process.

    Raises OSError if Ray does not start, or if a replica can't load the model or fails, and ValueError if this machine
    has too little for them.
    """
    gpus = connect(count, options["device"])
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it logs what it raises
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # Any row fills a block, and a block is what replicas are given and give back: no answer waits for another.
    context.target_max_block_size = 1
    try:
        in_flight = 2 * options["max_batch_size"]
        answers = ray.data.read_datasource(_Requests(requests), num_cpus=0, override_num_blocks=1).map_batches(
            _Replica,
            batch_size=None,
            fn_constructor_args=(options, name),
            compute=ActorPoolStrategy(
                min_size=count.least,
                max_size=count.most,
                max_tasks_in_flight_per_actor=in_flight,
                max_concurrent_calls_per_actor=in_flight,
            ),
            num_cpus=1,
            num_gpus=gpus,
        )
        for batch in answers.iter_batches(batch_size=None, prefetch_batches=0):
            for text, failure in zip(batch["answer"], batch["failure"], strict=True):
                if failure:
                    raise OSError(f"a replica can't load the model: {failure}")
                write(Answer(**json.loads(text)))
    except ray.exceptions.RayError as error:
        raise OSError(f"a replica failed: {_first_error(str(error))}") from None
    finally:
        ray.shutdown()


def _first_error(text: str) -> str:
    """The first exception that a text of tracebacks names."""
    found = re.search(r"^[\w.]+: .*", text, re.MULTILINE)
    return found[0] if found else text


class _Requests(Datasource):
    """Requests for Ray Data, read by one process on the machine of the driver as replicas ask for more."""

    def __init__(self, requests: Iterable[BatchRequest]):
        super().__init__()
        self._requests = requests

    @property
    def supports_distributed_reads(self) -> bool:
        return False

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One, whatever is wanted."""
        requests = self._requests

        def read() -> Iterator[pyarrow.Table]:
            for request in requests:
                yield pyarrow.table({"request": [json.dumps(asdict(request))]})

        return [ReadTask(read, BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None))]


class _Replica:
    """A model in a process of its own, and the server's app for it.

    Ray would start one whose constructor raises again and again, so what loading raises is part of every result.
    """

    def __init__(self, options: dict[str, Any], name: str):
        self._failure = ""
        try:
            self._app = app_for(AsyncLLM(**options), name)
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"

    async def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """The answer to each request, both as JSON texts, or else why there is none."""
        count = len(batch["request"])
        return {
            "answer": [""] * count if self._failure else await self._answers(batch["request"]),
            "failure": [self._failure] * count,
        }

    async def _answers(self, texts: Iterable[str]) -> list[str]:
        requests = [BatchRequest(**json.loads(text)) for text in texts]
        answers = await asyncio.gather(*(answer(self._app, request) for request in requests))
        return [json.dumps(asdict(each)) for each in answers]
