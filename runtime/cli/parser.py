"""The commands and their switches."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..version import VERSION
from . import checkpoints, serving, talk
from .command_line import CommandParser, text
from .sampling_switches import add_switches

if TYPE_CHECKING:
    from ..replicas.count import Count

DEFAULT_MODEL = "internlm/internlm3-8b-instruct"


def command_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="internlm3", description="InternLM3 at the lowest latency one GPU allows.")
    parser.add_argument("--version", action="version", version=f"internlm3 {VERSION}")
    commands = parser.add_subparsers(
        title="commands", required=True, metavar="{chat,generate,serve,batch,info,perplexity,quantize,demo}"
    )

    def command(name: str, run: Callable[[argparse.Namespace], int | None], what: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=what, description=what)
        added.set_defaults(run=run)
        return added

    chat = command("chat", talk.chat, "Talk with a model in the terminal.")
    generate = command("generate", talk.generate, "Answer one prompt, streaming.")
    server = command("serve", serving.serve, "Serve a model under OpenAI's API.")
    batch = command(
        "batch", serving.batch, "Answer a file of requests in OpenAI's batch format. Run again, it goes on."
    )
    info = command("info", checkpoints.info, "Show a checkpoint's configuration, parameters and memory.")
    score = command("perplexity", checkpoints.perplexity, "Measure how well a model predicts a text.")
    quantise = command("quantize", checkpoints.quantize, "Write a checkpoint with 4 or 8 bits a weight.")
    demo = command("demo", talk.demo, "Fetch a small real model, convert it once, and talk with it.")

    for each in (chat, generate, server, batch, info, score):
        each.add_argument(
            "model",
            nargs="?",
            default=DEFAULT_MODEL,
            help=f"folder, repository or GGUF file (default: {DEFAULT_MODEL})",
        )
    batch.add_argument("source", metavar="IN.jsonl", help="the requests, one a line")
    batch.add_argument("out", metavar="OUT.jsonl", help="gets the answers; those that it has are not computed again")
    batch.add_argument(
        "--replicas", type=_replicas, metavar="N",
        help="answer by N copies of the model on a Ray cluster, the one of RAY_ADDRESS or of this machine",
    )  # fmt: skip
    quantise.add_argument("model", help="folder or repository")
    quantise.add_argument("out", help="the new folder")
    generate.add_argument("-p", "--prompt", required=True, type=text, help="the prompt; - reads standard input")
    generate.add_argument("--raw", action="store_true", help="continue the bare text, without the chat template")
    demo.add_argument(
        "-p", "--prompt", type=text, help=f"answer this and quit (default: {talk.DEMO_QUESTION!r}, then chat)"
    )
    server.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all (default: 127.0.0.1)")
    server.add_argument("--port", type=_port, default=8000, help="port to listen on; 0 is any (default: 8000)")
    server.add_argument(
        "--api-key", help="clients must send this as a bearer token (default: INTERNLM3_API_KEY, if it is set)"
    )
    for each in (server, batch):
        each.add_argument("--served-model-name", metavar="NAME", help="the model's name in the API (default: MODEL)")
    server.add_argument(
        "--max-waiting", type=_count, default=256, help="requests that may wait; more get 429 (default: 256)"
    )
    server.add_argument(
        "--allow-origin", action="append", default=[], metavar="ORIGIN",
        help="let web pages from there use the server, such as https://chat.example; may be given again",
    )  # fmt: skip
    server.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="serve under this name, too, besides addresses, localhost and the machine's own; may be given again",
    )  # fmt: skip
    server.add_argument(
        "--replicas", type=_replicas, metavar="N",
        help="serve by N copies of the model on a Ray cluster, the one of RAY_ADDRESS or of this machine; "
        "1-4: from one to four, as the requests ask for",
    )  # fmt: skip
    info.add_argument("--length", type=int, help="context length of the KV cache (default: the trained window)")

    score.add_argument("text", nargs="?", help="a file of text; - reads standard input (default: one that ships)")
    score.add_argument("--window", type=int, help="tokens that the model sees at once (default: 2048)")
    score.add_argument("--stride", type=int, help="tokens from one window to the next (default: half a window)")

    quantise.add_argument(
        "--bits", required=True, choices=("4", "8", "fp8"), help="of a weight; the head gets 8 bits in any case"
    )
    quantise.add_argument(
        "--group", type=int, choices=(32, 64, 128), help="4 bits: weights that share a scale (default: 128)"
    )
    quantise.add_argument(
        "--symmetric", action="store_true", help="4 bits: without zero points, less exact, for transformers"
    )
    quantise.add_argument(
        "--calibrate", metavar="TEXT", help="4 bits: a file of text like the model's later input (default: one ships)"
    )

    for each in (chat, generate, server, batch, demo, info, score, quantise):
        group = each.add_argument_group("model")
        if each is not quantise:
            group.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
        group.add_argument("--revision", help="branch, tag or commit on the hub")
        group.add_argument("--local-files-only", action="store_true", help="use cached files only, without network")
        if each is info:
            continue
        group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        if each is quantise:
            continue
        group.add_argument("--max-seq-len", type=int, help="context length: prompt and answer together, in tokens")
        group.add_argument("--quantization", help="quantise the weights on load: int4, int8 or fp8")
        if each in (server, batch):
            group.add_argument(
                "--max-batch-size", type=_count, default=16, help="answers decoded together; more wait (default: 16)"
            )
        if each in (score, server, batch):
            continue
        group = each.add_argument_group("conversation")
        group.add_argument("--system", type=text, help="the system prompt")
        group.add_argument("--thinking", action="store_true", help="InternLM3's deep-thinking mode")
        group = each.add_argument_group("sampling (default: the checkpoint's generation_config.json)")
        group.add_argument("--recommended", action="store_true", help="InternLM3's recommended settings")
        add_switches(group)
    # So that the demo's answer is the same on every machine.
    demo.set_defaults(temperature=0.0)
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, not {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, not {text!r}")
    return int(text)


def _replicas(text: str) -> Count:
    from ..replicas.count import Count

    try:
        return Count.read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
