"""The command line: `internlm3 chat | generate | info | demo`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .llm import LLM
    from .outputs import Chunk

DEFAULT_MODEL = "internlm/internlm3-8b-instruct"
DEMO_QUESTION = "What is the capital of France?"
CHAT_HELP = "/reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer."
_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0, 1 after an error, 2 for bad usage, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    # On a busy machine, threads that spin while they wait for each other make an answer thirty times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        args.run(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone (`internlm3 ... | head`). Keep Python from complaining about it at exit.
        sys.stdout = None
        return 1
    except (ValueError, TypeError, OSError, MemoryError, ImportError) as error:
        print(f"internlm3: error: {error}", file=sys.stderr)
        return 1
    return 0


# -------------------------------------------------------------------- commands


def _generate(args: argparse.Namespace) -> None:
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt:
        raise ValueError("the prompt is empty: give one with -p, or on standard input with -p -")
    llm = _load(args)
    if args.raw:
        if args.system or args.thinking:
            raise ValueError("--raw continues the bare text: it has no room for --system or --thinking")
        chunks = llm.stream(prompt, _preset(args), **_settings(args))
    else:
        chunks = _answer(llm, [*_system(args), {"role": "user", "content": prompt}], args)
    _show(chunks)


def _chat(args: argparse.Namespace) -> None:
    llm = _load(args)
    print(CHAT_HELP, file=sys.stderr)
    _converse(llm, _system(args), args)


def _demo(args: argparse.Namespace) -> None:
    from .standin import standin_checkpoint

    args.model = str(standin_checkpoint())
    llm = _load(args)
    question = args.prompt or DEMO_QUESTION
    print(f"> {question}")
    messages = [*_system(args), {"role": "user", "content": question}]
    messages.append({"role": "assistant", "content": _show(_answer(llm, messages, args))})
    if sys.stdin.isatty() and args.prompt is None:
        print(CHAT_HELP, file=sys.stderr)
        _converse(llm, messages, args)


def _info(args: argparse.Namespace) -> None:
    from .causal_lm import InternLM3ForCausalLM
    from .checkpoint import resolve_dtype
    from .config import InternLM3Config
    from .generation import read_generation_config
    from .sampling import SamplingParams
    from .snapshots import locate

    folder = locate(args.model, revision=args.revision, local_files_only=args.local_files_only, weights=False)
    config = InternLM3Config.from_file(folder / "config.json")
    dtype = resolve_dtype(args.dtype) or resolve_dtype(config.dtype or "bfloat16")
    assert dtype is not None
    size = dtype.itemsize
    parameters = sum(weight.numel() for weight in InternLM3ForCausalLM(config, device="meta").parameters())
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
    length = args.length or config.max_position_embeddings
    generation_config = read_generation_config(folder)
    for key, value in config.to_dict().items():
        print(f"{key:24} {value}")
    print()
    print(f"{'parameters':24} {parameters:,}")
    print(f"{'weights':24} {parameters * size / 1e9:.2f} GB in {str(dtype).removeprefix('torch.')}")
    print(f"{'KV cache':24} {per_token:,} bytes a token, {length * per_token / 1e9:.2f} GB at {length:,} tokens")
    print(f"{'generation_config.json':24} {generation_config or 'none'}")
    print(f"{'default settings':24} {SamplingParams.from_generation_config(generation_config)}")


# -------------------------------------------------------------------- what they share


def _load(args: argparse.Namespace) -> LLM:
    from .llm import LLM

    return LLM(
        args.model,
        dtype=args.dtype,
        device=args.device,
        max_seq_len=args.max_seq_len,
        revision=args.revision,
        local_files_only=args.local_files_only,
        progress=sys.stderr.isatty(),
    )


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that were given."""
    return {name: getattr(args, name) for name in _SAMPLING if getattr(args, name) is not None}


def _preset(args: argparse.Namespace) -> Any:
    from .sampling import RECOMMENDED

    return RECOMMENDED if args.recommended else None


def _system(args: argparse.Namespace) -> list[dict[str, str]]:
    return [{"role": "system", "content": args.system}] if args.system else []


def _answer(llm: LLM, messages: list[dict[str, str]], args: argparse.Namespace) -> Iterator[Chunk]:
    return llm.stream(messages, _preset(args), thinking=args.thinking, **_settings(args))


def _show(chunks: Iterator[Chunk]) -> str:
    """Prints an answer as it comes, then its figures; returns its text. Ctrl-C ends the answer, not the program."""
    text, chunk = "", None
    try:
        for chunk in chunks:
            text += chunk.text
            print(chunk.text, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
        if chunk is None:
            raise
    print(flush=True)
    if chunk is not None:
        print(
            f"[prompt {chunk.prompt_tokens} tokens, {chunk.prompt_tps:.1f} tokens/s; "
            f"answer {chunk.decode_tokens} tokens, {chunk.decode_tps:.1f} tokens/s; "
            f"peak memory {chunk.peak_memory:.2f} GB]",
            file=sys.stderr,
        )
    return text


def _converse(llm: LLM, messages: list[dict[str, str]], args: argparse.Namespace) -> None:
    """Question and answer until the input ends. A question that can't be answered is taken back, with the reason."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - line editing and history in input()
    opening = [message for message in messages if message["role"] == "system"]
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            print()
            return
        if question.strip() == "/exit":
            return
        if question.strip() == "/reset":
            messages = list(opening)
        elif question.strip():
            asked = [*messages, {"role": "user", "content": question}]
            try:
                messages = [*asked, {"role": "assistant", "content": _show(_answer(llm, asked, args))}]
            except ValueError as error:
                print(f"{error} (/reset begins anew)", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="internlm3", description="InternLM3 at the lowest latency one GPU allows.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="{chat,generate,info,demo}")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    chat = command("chat", _chat, "Talk with a model in the terminal.")
    generate = command("generate", _generate, "Answer one prompt, streaming.")
    info = command("info", _info, "Show a checkpoint's configuration, parameters and memory.")
    demo = command("demo", _demo, "Fetch a small real model, convert it once to InternLM3's format, and talk with it.")

    for each in (chat, generate, info):
        each.add_argument(
            "model", nargs="?", default=DEFAULT_MODEL, help=f"folder or hub repository (default: {DEFAULT_MODEL})"
        )
    generate.add_argument("-p", "--prompt", required=True, help="the prompt; - reads standard input")
    generate.add_argument("--raw", action="store_true", help="continue the bare text, without the chat template")
    demo.add_argument("-p", "--prompt", help=f"ask this and end (default: {DEMO_QUESTION!r}, then chat)")
    info.add_argument("--length", type=int, help="tokens to size the KV cache for (default: the trained window)")

    for each in (chat, generate, demo, info):
        group = each.add_argument_group("model")
        group.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
        group.add_argument("--revision", help="branch, tag or commit on the hub")
        group.add_argument("--local-files-only", action="store_true", help="use the cache, ask no network")
        if each is info:
            continue
        group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        group.add_argument("--max-seq-len", type=int, help="prompt and answer together, in tokens")
        group = each.add_argument_group("conversation")
        group.add_argument("--system", help="the system prompt")
        group.add_argument("--thinking", action="store_true", help="InternLM3's deep-thinking mode")
        group = each.add_argument_group("sampling (default: the checkpoint's generation_config.json)")
        group.add_argument("--recommended", action="store_true", help="InternLM3's recommended settings")
        group.add_argument("-n", "--max-tokens", type=int, help="the longest answer, in tokens")
        group.add_argument("--temperature", "--temp", type=float, help="0 is greedy")
        group.add_argument("--top-k", type=int)
        group.add_argument("--top-p", type=float)
        group.add_argument("--min-p", type=float)
        group.add_argument("--repetition-penalty", type=float)
        group.add_argument("--seed", type=int, help="the same seed gives the same text")
        group.add_argument("--stop", action="append", help="end the answer at this text; may be given again")
    # The demo's answer should be the same for everybody.
    demo.set_defaults(temperature=0.0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
