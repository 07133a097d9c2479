"""Every product of an index and a stride has 64 bits: arguments whose rows, heads, pages or slots are far apart.

They span 2^31 elements or more, of which only the few memory pages in use exist. A product of 32 bits would read and
write elsewhere, or crash. So do results of many rows, of which the interpreter computes only the last.
"""

import contextlib
from unittest import mock

import pytest
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from internlm3 import kernels
from internlm3.kernels.triton.dequantise import dequantise
from internlm3.kernels.triton.launch import INTERPRETED
from internlm3.tests.kernels.support import DEVICE, assert_same, generator, normal
from internlm3.tests.kernels.test_linear_quantised import quantised

# One worker runs all of them: on a GPU each takes gigabytes.
pytestmark = pytest.mark.xdist_group("gigabytes")

ROWS, WIDTH, HEADS, DIM, PAGES, PAGE, VOCAB = 3, 64, 3, 16, 4, 16, 70


def function(op):
    """An op by its name here; those with a quantised weight end with "_quantised"."""
    return getattr(kernels, op.removesuffix("_quantised"))


def arguments():
    """By op. Three rows, each a sequence, three heads, four pages: few, so that the last one is far from the first."""
    rng = generator(1)

    def random(*shape, dtype=torch.bfloat16):
        return normal(rng, *shape, dtype=dtype)

    def whole(*shape, below):
        return torch.randint(below, shape, generator=rng, dtype=torch.int32).to(DEVICE)

    x, norm, eps = random(ROWS, WIDTH), random(WIDTH), 1e-5
    weight, residual = random(6, WIDTH), random(ROWS, 6)
    caches = {"k_cache": random(PAGES, HEADS, PAGE, DIM), "v_cache": random(PAGES, HEADS, PAGE, DIM)}
    places = {
        "block_table": torch.tensor([[3, 3, 3], [1, 2, 0], [0, 0, 0]], dtype=torch.int32, device=DEVICE),
        "seq_lens": torch.tensor([16, 33, 48], dtype=torch.int32, device=DEVICE),
    }
    rope = {"inv_freq": random(ROWS, DIM // 2, dtype=torch.float32), **caches, **places}
    ones = torch.ones(ROWS, device=DEVICE)
    numbers = torch.arange(ROWS, device=DEVICE)
    words = -(-VOCAB // 32)
    packed = quantised(rng, 6, WIDTH, 16, "int4", 8, minimum=True)[0]
    return {
        "advance": lambda: {
            "sampled": whole(2 * ROWS, below=VOCAB).long(),
            "logprob": ones.repeat(2),
            "token": numbers.clone(),
            "seq_lens": places["seq_lens"],
            "max_len": places["seq_lens"] + 9,
            "min_len": places["seq_lens"] + 1,
            "history": whole(ROWS, 50, below=VOCAB),
            "report": whole(ROWS, 7, below=2),
            "drafts": whole(ROWS, 2, below=VOCAB).long(),
            "output_counts": whole(ROWS, VOCAB, below=9),
            **{name: whole(ROWS, words, below=2**31 - 1) for name in ("end_mask", "permitted", "allowed")},
        },
        "count_prompt": lambda: {
            "request": whole(9, below=VOCAB),
            "lengths": torch.tensor([9, 0], dtype=torch.int32, device=DEVICE),
            "history": whole(9, below=9),
            "prompt_counts": whole(VOCAB, below=9),
            "output_counts": whole(VOCAB, below=9),
            "logit_bias": random(VOCAB, dtype=torch.float32),
        },
        "draft": lambda: {
            "history": whole(ROWS, 60, below=3),
            "seq_lens": places["seq_lens"],
            "max_len": places["seq_lens"] + 9,
            "min_len": places["seq_lens"],
            "most_drafts": places["seq_lens"],
            "report": whole(ROWS, 7, below=2),
            "drafts": whole(ROWS, 5, below=VOCAB).long(),
            "draft_lens": whole(ROWS, 5, below=VOCAB),
        },
        "embed": lambda: {"token_ids": numbers, "table": x},
        "linear": lambda: {"x": x, "weight": weight},
        "linear_add": lambda: {"x": x, "weight": weight, "residual": residual},
        "linear_quantised": lambda: {"x": x, "weight": packed},
        "paged_attention": lambda: {"q": random(ROWS, HEADS, DIM), **caches, **places, "scale": 0.3},
        "rms_norm": lambda: {"x": x, "weight": norm, "eps": eps},
        "rms_norm_linear": lambda: {"x": x, "norm": norm, "eps": eps, "weight": weight},
        "rms_norm_qkv_rope_cache": lambda: {
            "x": x,
            "norm": norm,
            "eps": eps,
            "weight": random(3 * HEADS * DIM, WIDTH),
            "bias": None,
            **rope,
        },
        "rms_norm_swiglu": lambda: {"x": x, "norm": norm, "eps": eps, "weight": weight},
        "rope_and_cache": lambda: {"qkv": random(ROWS, 3 * HEADS * DIM), **rope},
        "sample": lambda: {
            "logits": random(2 * ROWS, VOCAB),
            "temperature": ones.repeat(2),
            "top_p": ones.repeat(2) * 0.9,
            "repetition_penalty": ones.repeat(2) * 2,
            "prompt_counts": whole(ROWS, VOCAB, below=2),
            "output_counts": whole(ROWS, VOCAB, below=2),
            "logit_bias": random(ROWS, VOCAB, dtype=torch.float32),
            "allowed": whole(ROWS, words, below=2**31 - 1),
            "drafts": whole(ROWS, 2, below=VOCAB).long(),
            "seed": numbers.repeat(2),
            "stream": numbers.repeat(2),
            "position": numbers.repeat(2),
        },
        "store_row": lambda: {
            "row": whole(5, below=9),
            "rows": whole(5 * ROWS, below=9),
            "starts": torch.tensor([0, 2, 5], dtype=torch.int32, device=DEVICE),
            "index": torch.ones(1, dtype=torch.int32, device=DEVICE),
        },
        "swiglu": lambda: {"gate_up": x},
    }


def far(x, axis):
    """A copy of x in its own memory, whose last slice along the axis begins 2^31 elements or more after the first."""
    stride = -(-(2**31) // (x.shape[axis] - 1))
    stride = -(-stride // 16) * 16
    shape = [*x.shape]
    del shape[axis]
    strides = list(torch.empty(shape, device="meta").stride())
    strides.insert(axis, stride)
    extent = sum((size - 1) * step for size, step in zip(x.shape, strides, strict=True)) + 1
    memory = torch.empty(extent, dtype=x.dtype, device=DEVICE)
    return memory.as_strided(x.shape, strides).copy_(x)


def axes():
    for op, given in arguments().items():
        for name, x in given().items():
            if isinstance(x, torch.Tensor) and name != "v_cache":
                yield from (pytest.param(op, name, axis, id=f"{op}-{name}-{axis}") for axis in range(x.dim() - 1))


def test_every_op_has_arguments():
    missing = set(kernels.__all__) - arguments().keys()
    assert not missing, f"`arguments` of {__file__} has none for {', '.join(sorted(missing))}"


@pytest.mark.parametrize(("op", "name", "axis"), list(axes()))
def test_far_slices_are_found(op, name, axis):
    near, wide = arguments()[op](), arguments()[op]()
    # Attention requires caches of equal strides.
    for each in ("k_cache", "v_cache") if name == "k_cache" else (name,):
        wide[each] = far(wide[each], axis)
    expected, found = (function(op)(**args) for args in (near, wide))
    if expected is not None:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for each, x in near.items():
        if isinstance(x, torch.Tensor):
            assert_same(x, **{each: wide[each]})


def last(grid):
    """The last program of a launch."""
    return tuple(size - 1 for size in grid)


def large_results():
    """By a name: the op, its arguments, and which program of a launch computes the end of the result.

    Every row has the same input. The results have 2^31 elements or more; those of the last case are partial sums.
    """
    rng = generator(2)

    def random(*shape, dtype=torch.bfloat16):
        return normal(rng, *shape, dtype=dtype)

    rows, width = 2**15 + 1, 2**16
    many, heads, tokens = 2**31 // (14 * 128) + 1, 2**13 + 1, 2**31 // 512 + 1
    cache, row = (random(1, 2, 16, 128), random(1, 2, 16, 128)), torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)

    def lengths(count):
        return torch.full((count,), 3, dtype=torch.int32, device=DEVICE)

    return {
        "embed": ("embed", (lengths(rows).long() - 1, random(3, width)), last),
        "rms_norm": ("rms_norm", (random(1, width).expand(rows, width), random(width), 1e-5), last),
        "swiglu": ("swiglu", (random(1, 2 * width).expand(rows, -1),), last),
        "rope_and_cache": (
            "rope_and_cache",
            (
                random(1, 18 * 128).expand(many, -1), random(1, 64, dtype=torch.float32).expand(many, -1), *cache,
                row.expand(many, 1), lengths(many),
            ),
            lambda grid: (grid[0] - 1, 0, 0),  # all of q's heads
        ),
        # One sequence of three tokens, after padding. Programs of the last rows have the first numbers.
        "paged_attention": (
            "paged_attention",
            (random(1, 4, 128).expand(tokens, -1, -1), *cache, row, lengths(1), 0.3),
            lambda grid: (grid[0] - 1, 0, 0),
        ),
        "paged_attention, split": (
            "paged_attention",
            (random(1, 32, 128).expand(heads, -1, -1), *cache, row.expand(heads, 1), lengths(heads), 0.3),
            last,
        ),
    }  # fmt: skip


@contextlib.contextmanager
def one_program(chosen):
    """Each launch runs one program in the interpreter: chosen(grid)."""
    launch = GridExecutor.__call__

    def launch_one(self, *args, **kwargs):
        grid = (*self.grid, *(1,) * (3 - len(self.grid)))
        self.grid = (1,)
        place = {"set_grid_dim": {"grid_dim": grid}, "set_grid_idx": {"grid_idx": chosen(grid)}}
        with contextlib.ExitStack() as stack:
            for name, values in place.items():
                changed = mock.patch.object(
                    InterpreterBuilder, name, lambda builder, *_, values=values: vars(builder).update(values)
                )
                stack.enter_context(changed)
            launch(self, *args, **kwargs)

    with mock.patch.object(GridExecutor, "__call__", launch_one):
        yield


@pytest.mark.parametrize(("op", "args", "chosen"), large_results().values(), ids=[*large_results()])
def test_the_end_of_a_large_result(op, args, chosen):
    """The last 16 numbers, which are the same for fewer rows."""
    with one_program(chosen) if INTERPRETED else contextlib.nullcontext():
        found = function(op)(*args)
    rows = args[0].shape[0]
    fewer = [x[-1:] if isinstance(x, torch.Tensor) and x.shape[0] == rows else x for x in args]
    torch.testing.assert_close(found.flatten()[-16:], function(op)(*fewer).flatten()[-16:], rtol=0, atol=0)


@pytest.fixture(scope="module")
def long_weight():
    """2^31 words and more: the last rows, which are a weight of their own, after rows that nothing reads."""
    columns, rows = 2**13, 2**31 // 2**12 + 32
    small = quantised(generator(3), 32, columns, 0, "int8", 0)[0]
    words = torch.empty(rows, small.form.words, dtype=torch.int16, device=DEVICE)
    scales = torch.empty(1, rows, device=DEVICE)
    words[-32:], scales[:, -32:] = small.words, small.scales
    return small, small._replace(words=words, scales=scales)


@pytest.mark.parametrize("op", ["linear_quantised"])
def test_the_end_of_a_long_weight(op, long_weight):
    small, long = long_weight
    x = normal(generator(4), 3, small.form.columns, dtype=torch.bfloat16)
    with one_program(last) if INTERPRETED else contextlib.nullcontext():
        found = function(op)(x, long)
    assert_same(function(op)(x, small), found=found[:, -32:])


@pytest.mark.parametrize("op", ["linear_quantised"])
def test_the_end_of_a_long_weight_as_a_matrix(op, long_weight):
    """Which products of more than 64 rows compute first."""
    small, long = long_weight
    with one_program(last) if INTERPRETED else contextlib.nullcontext():
        found = dequantise(long, torch.bfloat16)
    columns = slice(-long.form.width, None)  # the program's last ones
    assert_same(dequantise(small, torch.bfloat16)[:, columns], found=found[-32:, columns])
