"""Commands that serve requests: serve, batch."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .load import llm_options, load

if TYPE_CHECKING:
    from ..api.async_llm import AsyncLLM
    from ..server.settings import Settings


def serve(args: argparse.Namespace) -> None:
    from ..server.settings import Settings

    try:
        from ..server.serve import serve as serve_requests
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: the server needs it: pip install 'internlm3[server]'") from None

    key = os.environ.get("INTERNLM3_API_KEY") or None if args.api_key is None else args.api_key
    if key is None and args.host not in ("127.0.0.1", "localhost", "::1"):
        print("internlm3: without --api-key, whoever reaches this machine may use the model", file=sys.stderr)
    settings = Settings(
        _served_name(args),
        host=args.host,
        api_key=key,
        allow_host=tuple(args.allow_host),
        allow_origin=tuple(args.allow_origin),
        max_waiting=args.max_waiting,
    )
    if args.replicas is not None:
        return _serve_replicas(args, settings)
    serve_requests(lambda: _load_async(args, max_waiting=settings.max_waiting), settings, args.port)


def _serve_replicas(args: argparse.Namespace, settings: Settings) -> None:
    try:
        from ..replicas.deploy import serve_replicas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: replicas need it: pip install 'internlm3[ray]'") from None
    serve_replicas(_replica_options(args), settings, args.port, args.replicas)


def batch(args: argparse.Namespace) -> int:
    if "-" in (args.source, args.out):
        raise ValueError(
            "a batch is read again and goes on where it was: name files, not - for standard input or output"
        )
    name, extra = _served_name(args), "server" if args.replicas is None else "ray"
    try:
        from ..batch.run import run_batch

        if args.replicas is None:
            from ..batch.on_this_machine import answer_on_this_machine

            answer_all = partial(answer_on_this_machine, lambda: _load_async(args), name)
        else:
            from ..batch.on_ray import answer_on_ray

            answer_all = partial(answer_on_ray, _replica_options(args), name, args.replicas)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: batches need it: pip install 'internlm3[{extra}]'") from None
    return 0 if run_batch(Path(args.source), Path(args.out), name, answer_all) else 1


def _load_async(args: argparse.Namespace, **options: Any) -> AsyncLLM:
    """options: of AsyncLLM."""
    from ..api.async_llm import AsyncLLM

    return AsyncLLM(load(args, max_batch_size=args.max_batch_size), **options)


def _replica_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of LLM for replicas, whose processes are elsewhere."""
    if args.device.startswith("cuda:"):
        raise ValueError(f"--device {args.device}: Ray gives each replica a GPU of its own; leave it out")
    options = {**llm_options(args), "max_batch_size": args.max_batch_size}
    if Path(args.model).exists():
        options["model"] = str(Path(args.model).resolve())
    return options


def _served_name(args: argparse.Namespace) -> str:
    """The model's name in the API: of a path only the last part, since the rest is nobody's business."""
    named = args.served_model_name
    return named or (Path(args.model).resolve().name if Path(args.model).exists() else args.model)
