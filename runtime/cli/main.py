"""The command line: `internlm3 chat | generate | info | demo`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..version import VERSION
from .chat import Chat, show
from .terminal import tolerate_other_encodings

if TYPE_CHECKING:
    from ..api.llm import LLM
    from ..api.outputs import Chunk

DEFAULT_MODEL = "internlm/internlm3-8b-instruct"
DEMO_QUESTION = "What is the capital of France?"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit status: 0, 1 after an error, 2 for bad usage, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    # How long OpenMP threads spin before they sleep. With less they sleep between two products of a decode step, which
    # makes it 1.3 times as long on an idle EPYC of two cores. With GNU OpenMP's default of 300000 they keep the cores
    # of a busy machine from other work, which makes it 2.6 times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    tolerate_other_encodings()
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has closed the pipe (`internlm3 ... | head`). Keep Python from reporting it again at exit.
        sys.stdout = None
        return 1
    except (ValueError, TypeError, OSError, MemoryError, ImportError) as error:
        print(f"internlm3: error: {error}", file=sys.stderr)
        return 1


# -------------------------------------------------------------------- commands


def _generate(args: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt:
        raise ValueError("the prompt is empty: give one with -p, or on standard input with -p -")
    if args.raw and (args.system or args.thinking):
        raise ValueError("--raw continues the bare text: it has no room for --system or --thinking")
    llm = _load(args)
    if args.raw:
        chunks = llm.stream(prompt, _preset(args), **_settings(args))
    else:
        chunks = _answer(llm, [*_system(args), {"role": "user", "content": prompt}], args)
    _, stopped = show(chunks)
    return 130 if stopped else 0


def _chat(args: argparse.Namespace) -> None:
    llm = _load(args)
    Chat(lambda messages: _answer(llm, messages, args), _system(args)).run()


def _demo(args: argparse.Namespace) -> int:
    from ..checkpoint.demo_model import demo_model_checkpoint

    args.model = str(demo_model_checkpoint(progress=sys.stderr.isatty()))
    llm = _load(args)
    question = args.prompt or DEMO_QUESTION
    print(f"> {question}")
    messages = [*_system(args), {"role": "user", "content": question}]
    text, stopped = show(_answer(llm, messages, args))
    if stopped:
        return 130
    if sys.stdin.isatty() and args.prompt is None:
        messages.append({"role": "assistant", "content": text})
        Chat(lambda messages: _answer(llm, messages, args), messages).run()
    return 0


def _info(args: argparse.Namespace) -> None:
    from ..api.llm import check_window
    from ..checkpoint.load import resolve_dtype
    from ..common.hub import locate
    from ..compat.causal_lm import InternLM3ForCausalLM
    from ..model.config import InternLM3Config
    from ..model.pages import PAGE, page_bytes, pages_of
    from ..sampling.generation_config import read_generation_config
    from ..sampling.params import SamplingParams

    folder = locate(args.model, revision=args.revision, local_files_only=args.local_files_only, weights=False)
    config = InternLM3Config.from_file(folder / "config.json")
    dtype = resolve_dtype(args.dtype) or resolve_dtype(config.dtype or "bfloat16")
    assert dtype is not None
    size = dtype.itemsize
    parameters = sum(weight.numel() for weight in InternLM3ForCausalLM(config, device="meta").parameters())
    per_token = page_bytes(config, dtype) // PAGE
    length = config.max_position_embeddings if args.length is None else args.length
    check_window(config, length)
    windows = 16 * pages_of(length) * page_bytes(config, dtype) / 1e9
    generation_config = read_generation_config(folder)
    for key, value in config.to_dict().items():
        print(f"{key:24} {value}")
    print()
    print(f"{'parameters':24} {parameters:,}")
    print(f"{'weights':24} {parameters * size / 1e9:.2f} GB in {str(dtype).removeprefix('torch.')}")
    print(f"{'KV cache':24} {per_token:,} bytes a token, {length * per_token / 1e9:.2f} GB at {length:,} tokens")
    print(f"{'KV cache of LLM':24} {windows:.2f} GB for 16 answers, but at most half of what the weights leave free")
    page = f"{page_bytes(config, dtype) / 1e6:.2f} MB for {PAGE} tokens, {pages_of(length):,} of them for {length:,}"
    print(f"{'admission':24} an answer waits for the pages of its prompt and max_tokens: {page}")
    print(f"{'generation_config.json':24} {generation_config or 'none'}")
    print(f"{'default settings':24} {SamplingParams.from_generation_config(generation_config)}")


# -------------------------------------------------------------------- shared by the commands


def _load(args: argparse.Namespace) -> LLM:
    from ..api.llm import LLM

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
    from dataclasses import fields

    from ..sampling.params import SamplingParams

    # All have a switch of their name but n and logprobs, of which a stream shows nothing.
    settings = {field.name: getattr(args, field.name, None) for field in fields(SamplingParams)}
    if args.logit_bias:
        settings["logit_bias"] = dict(args.logit_bias)
    return {name: value for name, value in settings.items() if value is not None}


def _sequence(text: str) -> list[int]:
    try:
        return [int(token) for token in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"token ids with commas between them are wanted, not {text!r}") from None


def _sequence_bias(text: str) -> tuple[list[int], float]:
    sequence, _, bias = text.partition("=")
    try:
        return _sequence(sequence), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"token ids, = and a number are wanted, not {text!r}") from None


def _bias(text: str) -> tuple[int, float]:
    [token], bias = _sequence_bias(text)
    return token, bias


def _preset(args: argparse.Namespace) -> Any:
    from ..sampling.params import RECOMMENDED

    return RECOMMENDED if args.recommended else None


def _system(args: argparse.Namespace) -> list[dict[str, str]]:
    return [{"role": "system", "content": args.system}] if args.system else []


def _answer(llm: LLM, messages: list[dict[str, str]], args: argparse.Namespace) -> Iterator[Chunk]:
    return llm.stream(messages, _preset(args), thinking=args.thinking, **_settings(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="internlm3", description="InternLM3 at the lowest latency one GPU allows.")
    parser.add_argument("--version", action="version", version=f"internlm3 {VERSION}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="{chat,generate,info,demo}")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
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
    demo.add_argument("-p", "--prompt", help=f"answer this and quit (default: {DEMO_QUESTION!r}, then chat)")
    info.add_argument(
        "--length", type=int, help="context length of the KV cache (default: the trained window)"
    )

    for each in (chat, generate, demo, info):
        group = each.add_argument_group("model")
        group.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
        group.add_argument("--revision", help="branch, tag or commit on the hub")
        group.add_argument("--local-files-only", action="store_true", help="use cached files only, without network")
        if each is info:
            continue
        group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        group.add_argument("--max-seq-len", type=int, help="context length: prompt and answer together, in tokens")
        group = each.add_argument_group("conversation")
        group.add_argument("--system", help="the system prompt")
        group.add_argument("--thinking", action="store_true", help="InternLM3's deep-thinking mode")
        group = each.add_argument_group("sampling (default: the checkpoint's generation_config.json)")
        group.add_argument("--recommended", action="store_true", help="InternLM3's recommended settings")
        group.add_argument("-n", "--max-tokens", type=int, help="the longest answer, in tokens")
        group.add_argument("--temperature", "--temp", type=float, help="0 is greedy")
        group.add_argument("--top-k", type=int, help="only among so many likeliest tokens")
        group.add_argument("--top-p", type=float, help="only among the likeliest tokens of so much probability")
        group.add_argument(
            "--min-p", type=float, help="only tokens of at least so much of the likeliest one's probability"
        )
        group.add_argument("--typical-p", type=float, help="only among the most typical tokens of so much probability")
        group.add_argument("--repetition-penalty", type=float, help="over prompt and answer; 1 is off")
        group.add_argument("--presence-penalty", type=float, help="over the answer, -2 to 2")
        group.add_argument("--frequency-penalty", type=float, help="over the answer, -2 to 2")
        group.add_argument("--logit-bias", type=_bias, action="append", metavar="ID=BIAS", help="may be given again")
        group.add_argument("--allowed-token-ids", type=int, nargs="+", metavar="ID", help="only these tokens")
        group.add_argument("--seed", type=int, help="the same seed gives the same text; -1 draws one")
        group.add_argument("--min-tokens", type=int, help="the shortest answer, in tokens")
        group.add_argument("--stop", action="append", help="end the answer at this text; may be given again")
        group.add_argument("--stop-token-ids", type=int, nargs="+", metavar="ID", help="end the answer at these tokens")
        group.add_argument("--ignore-eos", action="store_true", default=None, help="go on behind the model's own ends")
        group.add_argument(
            "--include-stop-str-in-output", action="store_true", default=None, help="print the text that ended it"
        )
        group.add_argument(
            "--no-skip-special-tokens", dest="skip_special_tokens", action="store_false", default=None,
            help="print special tokens too",
        )  # fmt: skip
        group.add_argument("--suppress-tokens", type=int, nargs="+", metavar="ID", help="never these tokens")
        group.add_argument(
            "--begin-suppress-tokens", type=int, nargs="+", metavar="ID", help="not these as the first one"
        )
        group.add_argument(
            "--bad-words-ids", type=_sequence, action="append", metavar="ID,ID", help="never these tokens in this "
            "order; may be given again",
        )  # fmt: skip
        group.add_argument("--no-repeat-ngram-size", type=int, help="no so many tokens a second time")
        group.add_argument(
            "--sequence-bias", type=_sequence_bias, action="append", metavar="ID,ID=BIAS", help="for the token that "
            "completes them; may be given again",
        )  # fmt: skip
        group.add_argument(
            "--exponential-decay-length-penalty", type=float, nargs=2, metavar=("START", "FACTOR"),
            help="an end is likelier with every token beyond START",
        )  # fmt: skip
        group.add_argument(
            "--forced-eos-token-id", type=int, nargs="+", metavar="ID", help="one of these is the last of --max-tokens"
        )
    # So that the demo's answer is the same on every machine.
    demo.set_defaults(temperature=0.0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
