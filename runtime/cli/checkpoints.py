"""Commands about a checkpoint: info, perplexity, quantize."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from .load import load


def info(args: argparse.Namespace) -> None:
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


def perplexity(args: argparse.Namespace) -> None:
    from ..checkpoint.quantise.calibration import shipped_text

    text = shipped_text() if args.text is None else _read_standard_input() if args.text == "-" else _read(args.text)
    found = load(args).perplexity(text, window=args.window, stride=args.stride)
    print(f"perplexity {found.value:.4f} +- {found.standard_error:.4f} (loss {found.loss:.5f} per token)")
    print(f"{found.predicted:,} tokens predicted, in windows of {found.window} that begin {found.stride} apart")


def quantize(args: argparse.Namespace) -> None:
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


def _read_standard_input() -> str:
    """All of standard input. What is no text is an error, as in a file: replaced, it would change what is measured."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not {error.encoding} text ({error}); give it in this encoding") from None


def _read(path: str) -> str:
    from ..common.files import read_text

    return read_text(Path(path))
