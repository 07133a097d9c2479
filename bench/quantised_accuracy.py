"""What quantising costs in perplexity: the demo model with its channels permuted, in every form.

    python -m bench.quantised_accuracy TEXT [--form int8 ...] [--windows 8] [--json FILE]

The demo model's weights were 4-bit groups before they were converted, so that any form that can express those groups
would seem to lose nothing. Permuting the channels of the residual stream, those of each MLP, and the values of each
head breaks the groups up and leaves the function as it is.

Each form goes the way of a user: a checkpoint is written, and loaded again, in float32. The tokens that are predicted
are those of windows of 512, the first of each left out, which begin at equal distances in TEXT. Where WikiText sets
punctuation apart by spaces, they are removed. Changes are relative to the permuted model in the same run, with the
standard error of the paired difference. A form that loses more than its goal is a failed check.
"""

import argparse
import hashlib
import math
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .options import one_of, output, positive
from .record import Part, Record, Row, stamp

WINDOW = 512


class Form(NamedTuple):
    """Arguments of `quantise_checkpoint`, whether weights are scaled by the text that ships, and the goal.

    goal: by how much perplexity may grow: what another implementation measured on the same model, and three standard
    errors.
    """

    form: Literal["int4", "int8", "fp8"]
    group: int = 128
    symmetric: bool = False
    scaled: bool = False
    goal: float | None = None


# The hidden size of the demo model is 576, so a group of 128 is one of 64 in all layers but down_proj.
FORMS = {
    "int8": Form("int8", goal=0.01),
    "fp8, head int8": Form("fp8", goal=0.03),
    "int4 g64, rounded only": Form("int4", goal=0.32),
    "int4 g32, rounded only": Form("int4", 32, goal=0.25),
    "int4 g64": Form("int4", scaled=True, goal=0.22),
    "int4 g32": Form("int4", 32, scaled=True, goal=0.15),
    "int4 g64, symmetric": Form("int4", symmetric=True, scaled=True),
    "int4 g32, symmetric": Form("int4", 32, symmetric=True, scaled=True),
}


def permuted(source: Path, target: Path) -> None:
    """Writes the checkpoint of the same function with its channels in another order."""
    from internlm3 import InternLM3ForCausalLM, InternLM3Tokenizer

    model = InternLM3ForCausalLM.from_pretrained(source, device="cpu", progress=False)
    config, weights = model.config, model.state_dict()
    generator = torch.Generator().manual_seed(0)

    def order(size: int) -> Tensor:
        return torch.randperm(size, generator=generator)

    residual = order(config.hidden_size)
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    into_residual = ("layernorm.weight", "norm.weight", "o_proj.weight", "down_proj.weight")
    for name, weight in weights.items():
        weight.copy_(weight[residual] if name.endswith(into_residual) else weight[:, residual])
    for layer in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        values = torch.stack([order(dim) for _ in range(kv_heads)])
        rows = values + torch.arange(0, kv_heads * dim, dim)[:, None]
        columns = values.repeat_interleave(heads // kv_heads, 0) + torch.arange(0, heads * dim, dim)[:, None]
        weights[f"{attention}v_proj.weight"].copy_(weights[f"{attention}v_proj.weight"][rows.flatten()])
        weights[f"{attention}o_proj.weight"].copy_(weights[f"{attention}o_proj.weight"][:, columns.flatten()])
        inner = order(config.intermediate_size)
        for name in ("gate_proj", "up_proj"):
            weights[f"{mlp}{name}.weight"].copy_(weights[f"{mlp}{name}.weight"][inner])
        weights[f"{mlp}down_proj.weight"].copy_(weights[f"{mlp}down_proj.weight"][:, inner])
    model.save_pretrained(target)
    InternLM3Tokenizer.from_pretrained(source).save_pretrained(target)


def plain(text: str) -> str:
    """WikiText's sentences as people write them."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?%)\]]|'s\b)", r"\1", text)
    text = re.sub(r"([(\[$£]) ", r"\1", text)
    return re.sub(r'" ([^"\n]*?) "', r'"\1"', text)


@torch.inference_mode()
def losses(folder: Path, windows: Sequence[list[int]]) -> Tensor:
    """-ln p of each predicted token, in float64."""
    from internlm3 import InternLM3ForCausalLM

    model = InternLM3ForCausalLM.from_pretrained(folder, dtype="float32", device="cpu", progress=False)
    found = []
    for window in windows:
        ids = torch.tensor([window])
        logits = model(ids).logits[0, :-1].float()
        found.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").double())
    return torch.cat(found)


def bits_a_weight(folder: Path) -> float:
    """Of the linear layers, with their scales and zero points."""
    from internlm3.runtime.checkpoint.weight_files import WeightFiles
    from internlm3.runtime.model.config import InternLM3Config
    from internlm3.runtime.model.model import LanguageModel

    def linear(name: str) -> bool:
        return "_proj." in name or name.startswith("lm_head.")

    files = WeightFiles.open(folder)
    stored = sum(
        math.prod(shape) * dtype.itemsize
        for header in files.headers.values()
        for name, (shape, dtype) in header.items()
        if linear(name)
    )
    model = LanguageModel(InternLM3Config.from_file(folder / "config.json"), device="meta")
    return 8 * stored / sum(weight.numel() for name, weight in model.state_dict().items() if linear(name))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quantised_accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("text", type=Path, help="a file of text, such as the test set of WikiText-2")
    parser.add_argument("--form", type=one_of("form", FORMS), nargs="+", default=list(FORMS), metavar="FORM")
    parser.add_argument("--windows", type=positive, default=8, help="of 512 tokens")
    parser.add_argument("--json", type=output, help="write the record: every figure, the machine and the versions")
    args = parser.parse_args(arguments)

    from internlm3 import InternLM3Tokenizer
    from internlm3.runtime.checkpoint.demo_model import demo_model_checkpoint
    from internlm3.runtime.checkpoint.quantise.calibration import shipped_text
    from internlm3.runtime.checkpoint.quantise.checkpoint import quantise_checkpoint

    content = args.text.read_text("utf-8")
    source = demo_model_checkpoint(progress=False)
    tokenizer = InternLM3Tokenizer.from_pretrained(source)
    ids = tokenizer.encode(plain(content))
    if len(ids) < args.windows * WINDOW:
        parser.error(f"{args.text} has {len(ids)} tokens, and {args.windows} windows need {args.windows * WINDOW}")
    step = len(ids) // args.windows
    windows = [ids[begin : begin + WINDOW] for begin in range(0, step * args.windows, step)]
    calibration = tokenizer.encode(shipped_text())
    digest = hashlib.sha256(content.encode()).hexdigest()
    text = {"text": args.text.name, "sha256": digest, "windows": args.windows, "calibration tokens": len(calibration)}

    made, part, rows = stamp(), Part("quantised_accuracy"), list[Row]()
    print("; ".join(f"{key} {value}" for key, value in {**made, **text}.items()))
    print("| form | bits a weight | perplexity | change | goal |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary, "permuted")
        permuted(source, base)
        exact = losses(base, windows)
        perplexity = exact.mean().exp().item()
        print(f"| bfloat16 | 16 | {perplexity:.4f} | | |")
        rows.append(part.figure("bfloat16", [perplexity], "perplexity", bits=16, **text))
        for index, name in enumerate(args.form):
            form, folder = FORMS[name], Path(temporary, str(index))
            quantise_checkpoint(
                base,
                folder,
                form.form,
                group=form.group,
                symmetric=form.symmetric,
                calibration=calibration if form.scaled else None,
                progress=False,
            )
            difference = losses(folder, windows) - exact
            change = math.expm1(difference.mean().item())
            error = (1 + change) * (difference.std() / math.sqrt(len(difference))).item()
            bits, goal = bits_a_weight(folder), "" if form.goal is None else f"{form.goal:.0%}"
            after = perplexity * (1 + change)
            print(f"| {name} | {bits:.2f} | {after:.4f} | {change:+.2%} +-{error:.2%} | {goal} |", flush=True)
            rows.append(part.figure(name, [after], "perplexity", bits=bits, change=change, error=error))
            if form.goal is not None:
                missed = f"{change:.2%} is more than {form.goal:.0%}" if change > form.goal else ""
                rows.append(part.check(f"{name}, goal", missed, goal=form.goal))
    if args.json:
        Record(made, rows).save(args.json)
    return int(any(row.state == "FAIL" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
