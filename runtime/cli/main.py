"""The command line, `internlm3 COMMAND`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..version import VERSION
from .chat import Chat, show
from .sampling_switches import add_switches, given_settings
from .terminal import tolerate_other_encodings, typing_discarded

if TYPE_CHECKING:
    from ..api.llm import LLM
    from ..api.outputs import Chunk
    from ..replicas.count import Count
    from ..server.settings import Settings

DEFAULT_MODEL = "internlm/internlm3-8b-instruct"
DEMO_QUESTION = "What is the capital of France?"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit status: 0, 1 after an error, 2 for bad usage, 130 after Ctrl-C."""
    _open_closed_streams()
    args = _parser().parse_args(argv)
    # How long OpenMP threads spin before they sleep. With less they sleep between two products of a decode step, which
    # makes it 1.3 times as long on an idle EPYC of two cores. With GNU OpenMP's default of 300000 they keep the cores
    # of a busy machine from other work, which makes it 2.6 times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    tolerate_other_encodings()
    try:
        if sys.stdout is None:
            raise OSError("standard output is closed: an answer has nowhere to go")
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


def _open_closed_streams() -> None:
    """Opens the null device in place of closed standard input (`<&-`) and error (`2>&-`), which are None.

    Each gets its own number again, 0 or 2. Else the next file that is opened would get it, and error messages of
    libraries in C.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115 (for as long as the process runs)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


# -------------------------------------------------------------------- commands


def _generate(args: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt:
        raise ValueError("the prompt is empty: give one with -p, or on standard input with -p -")
    if args.raw and (args.system or args.thinking):
        raise ValueError("--raw continues the bare text: it has no room for --system or --thinking")
    llm = _load(args)
    if args.raw:
        chunks = llm.stream(prompt, _preset(args), **given_settings(args))
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
    llm = _load(args, progress=True)
    question = args.prompt or DEMO_QUESTION
    print(f"> {question}")
    messages = [*_system(args), {"role": "user", "content": question}]
    chats = sys.stdin.isatty() and args.prompt is None
    with typing_discarded() if chats else contextlib.nullcontext():
        text, stopped = show(_answer(llm, messages, args))
    if stopped:
        return 130
    if chats:
        messages.append({"role": "assistant", "content": text})
        Chat(lambda messages: _answer(llm, messages, args), messages).run()
    return 0


def _info(args: argparse.Namespace) -> None:
    from ..api.inputs import check_window, checkpoint_defaults
    from ..checkpoint.gguf.folder import locate
    from ..checkpoint.load import resolve_dtype
    from ..checkpoint.sizes import read_per_token, stored_as, weight_bytes
    from ..model.config import InternLM3Config
    from ..model.kv_cache import PAGE, page_bytes, pages_of
    from ..model.model import LanguageModel
    from ..sampling.generation_config import read_generation_config

    folder = locate(args.model, revision=args.revision, local_files_only=args.local_files_only, weights=False)
    config = InternLM3Config.from_file(folder / "config.json")
    dtype = resolve_dtype(args.dtype) or resolve_dtype(config.dtype or "bfloat16")
    assert dtype is not None
    sizes = weight_bytes(folder, config, dtype)
    parameters = sum(weight.numel() for weight in LanguageModel(config, device="meta").parameters())
    per_token = page_bytes(config, dtype) // PAGE
    length = check_window(config, args.length, "--length")
    windows = 16 * pages_of(length) * page_bytes(config, dtype) / 1e9
    generation_config = read_generation_config(folder)
    defaults, _ = checkpoint_defaults(folder, config.vocab_size)
    for key, value in config.to_dict().items():
        print(f"{key:24} {value}")
    print()
    print(f"{'parameters':24} {parameters:,}")
    name, quantised = str(dtype).removeprefix("torch."), stored_as(folder, config)
    how = f"as {quantised}; what is not quantised in {name}" if quantised else f"in {name}"
    print(f"{'weights':24} {sum(sizes.values()) / 1e9:.2f} GB {how}")
    print(f"{'read per decoded token':24} {read_per_token(sizes) / 1e9:.2f} GB of weights, and the KV cache so far")
    print(f"{'KV cache':24} {per_token:,} bytes per token, {length * per_token / 1e9:.2f} GB at {length:,} tokens")
    print(f"{'KV cache of LLM':24} {windows:.2f} GB for 16 sequences, but at most half of the memory that is free")
    page = f"{page_bytes(config, dtype) / 1e6:.2f} MB for {PAGE} tokens, {pages_of(length):,} of them for {length:,}"
    print(f"{'admission':24} a request starts once pages for its prompt and max_tokens are free: {page}")
    print(f"{'generation_config.json':24} {generation_config or 'none'}")
    print(f"{'default settings':24} {defaults}")


def _perplexity(args: argparse.Namespace) -> None:
    from ..checkpoint.quantise.calibration import shipped_text

    text = shipped_text() if args.text is None else sys.stdin.read() if args.text == "-" else _read(args.text)
    found = _load(args).perplexity(text, window=args.window, stride=args.stride)
    print(f"perplexity {found.value:.4f} +- {found.standard_error:.4f} (loss {found.loss:.5f} per token)")
    print(f"{found.predicted:,} tokens predicted, in windows of {found.window} that begin {found.stride} apart")


def _quantize(args: argparse.Namespace) -> None:
    from ..api.quantize import quantize
    from .threads import leave_busy_cores

    leave_busy_cores()
    quantize(
        args.model,
        args.out,
        args.bits,
        group=args.group,
        symmetric=args.symmetric,
        calibration=None if args.calibrate is None else _read(args.calibrate),
        device=args.device,
        revision=args.revision,
        local_files_only=args.local_files_only,
        progress=sys.stderr.isatty(),
    )


def _serve(args: argparse.Namespace) -> None:
    from ..server.settings import Settings

    try:
        from ..server.serve import serve
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: the server needs it: pip install 'internlm3[server]'") from None
    from ..api.async_llm import AsyncLLM

    key = args.api_key or os.environ.get("INTERNLM3_API_KEY") or None
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
    serve(
        lambda: AsyncLLM(_load(args, max_batch_size=args.max_batch_size), max_waiting=settings.max_waiting),
        settings,
        args.port,
    )


def _serve_replicas(args: argparse.Namespace, settings: Settings) -> None:
    try:
        from ..replicas.deploy import serve_replicas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: replicas need it: pip install 'internlm3[ray]'") from None
    if args.device.startswith("cuda:"):
        raise ValueError(f"--device {args.device}: Ray gives each replica a GPU of its own; leave it out")
    options = {**_options(args), "max_batch_size": args.max_batch_size}
    if Path(args.model).exists():
        options["model"] = str(Path(args.model).resolve())
    serve_replicas(options, settings, args.port, args.replicas)


def _batch(args: argparse.Namespace) -> int:
    try:
        from ..batch.on_this_machine import answer_on_this_machine
        from ..batch.run import run_batch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: batches need it: pip install 'internlm3[server]'") from None
    from ..api.async_llm import AsyncLLM

    def load() -> AsyncLLM:
        return AsyncLLM(_load(args, max_batch_size=args.max_batch_size))

    answer_all = partial(answer_on_this_machine, load, _served_name(args))
    return 0 if run_batch(Path(args.source), Path(args.out), answer_all) else 1


def _read(path: str) -> str:
    from ..common.files import read_text

    return read_text(Path(path))


# -------------------------------------------------------------------- shared by the commands


def _load(args: argparse.Namespace, *, progress: bool | None = None, **options: Any) -> LLM:
    """progress: what LLM says on standard error while it loads; None: only if that is a terminal. options: of LLM."""
    from ..api.llm import LLM
    from .threads import leave_busy_cores

    leave_busy_cores()
    progress = sys.stderr.isatty() if progress is None else progress
    return LLM(**_options(args), progress=progress, **options)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of LLM that the group "model" of the switches gives."""
    return {
        "model": args.model,
        "dtype": args.dtype,
        "device": args.device,
        "max_seq_len": args.max_seq_len,
        "quantization": args.quantization,
        "revision": args.revision,
        "local_files_only": args.local_files_only,
    }


def _served_name(args: argparse.Namespace) -> str:
    """The model's name in the API: of a path only the last part, since the rest is nobody's business."""
    named = args.served_model_name
    return named or (Path(args.model).resolve().name if Path(args.model).exists() else args.model)


def _preset(args: argparse.Namespace) -> Any:
    from ..sampling.params import RECOMMENDED

    return RECOMMENDED if args.recommended else None


def _system(args: argparse.Namespace) -> list[dict[str, str]]:
    return [{"role": "system", "content": args.system}] if args.system else []


def _answer(llm: LLM, messages: list[dict[str, str]], args: argparse.Namespace) -> Iterator[Chunk]:
    return llm.stream(messages, _preset(args), thinking=args.thinking, **given_settings(args))


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, not {text!r}")
    return int(text)


def _replicas(text: str) -> Count:
    from ..replicas.count import Count

    try:
        return Count.read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="internlm3", description="InternLM3 at the lowest latency one GPU allows.")
    parser.add_argument("--version", action="version", version=f"internlm3 {VERSION}")
    commands = parser.add_subparsers(
        title="commands", required=True, metavar="{chat,generate,serve,batch,info,perplexity,quantize,demo}"
    )

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    chat = command("chat", _chat, "Talk with a model in the terminal.")
    generate = command("generate", _generate, "Answer one prompt, streaming.")
    server = command("serve", _serve, "Serve a model under OpenAI's API.")
    batch = command("batch", _batch, "Answer a file of requests in OpenAI's batch format; run again, it goes on.")
    info = command("info", _info, "Show a checkpoint's configuration, parameters and memory.")
    score = command("perplexity", _perplexity, "Measure how well a model predicts a text.")
    quantise = command("quantize", _quantize, "Write a checkpoint with 4 or 8 bits a weight, as compressed-tensors.")
    demo = command("demo", _demo, "Fetch a small real model, convert it once to InternLM3's format, and talk with it.")

    for each in (chat, generate, server, batch, info, score):
        each.add_argument(
            "model",
            nargs="?",
            default=DEFAULT_MODEL,
            help=f"folder, repository or GGUF file (default: {DEFAULT_MODEL})",
        )
    batch.add_argument("source", metavar="IN.jsonl", help="the requests, one a line")
    batch.add_argument("out", metavar="OUT.jsonl", help="gets the answers; those that it has are not computed again")
    quantise.add_argument("model", help="folder or repository")
    quantise.add_argument("out", help="the new folder")
    generate.add_argument("-p", "--prompt", required=True, help="the prompt; - reads standard input")
    generate.add_argument("--raw", action="store_true", help="continue the bare text, without the chat template")
    demo.add_argument("-p", "--prompt", help=f"answer this and quit (default: {DEMO_QUESTION!r}, then chat)")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all (default: 127.0.0.1)")
    server.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
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
        group.add_argument("--system", help="the system prompt")
        group.add_argument("--thinking", action="store_true", help="InternLM3's deep-thinking mode")
        group = each.add_argument_group("sampling (default: the checkpoint's generation_config.json)")
        group.add_argument("--recommended", action="store_true", help="InternLM3's recommended settings")
        add_switches(group)
    # So that the demo's answer is the same on every machine.
    demo.set_defaults(temperature=0.0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
