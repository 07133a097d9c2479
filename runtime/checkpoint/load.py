"""Loading a model. All checks use the file headers and come first; then weights are copied shard by shard."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from ..common.progress import hides_bar
from ..common.shown import shown
from ..model.config import InternLM3Config
from ..model.model import LanguageModel
from ..model.quantised_linear import Rows, biases, linear_weights, quantise_layers
from .cpu_dtype import cpu_dtype
from .gguf.folder import weights_of
from .parameters import check_parameters, names_in, parameters_in
from .quantise.rounded_files import RoundedFiles
from .quantise.rounding import FORMS, Form
from .quantised.methods import KEY, method_of
from .quantised.quantised_files import QuantisedFiles
from .quantised.scheme import Method
from .weight_files import WeightFiles

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}

Model = TypeVar("Model", bound=LanguageModel)


def load_model(
    cls: type[Model],
    folder: Path,
    *,
    config: InternLM3Config | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    batch_invariant: bool = False,
    use_safetensors: bool = False,
    fast_on_cpu: bool = False,
    keep_quantised: bool = False,
    quantization: str | None = None,
    progress: bool = True,
) -> Model:
    """Loads a checkpoint from a local folder into a new `cls`, in evaluation mode.

    Host memory stays below the size of the model plus one shard, or, of a quantised one, plus a few tensors.

    Args:
        cls: LanguageModel, or a subclass with the same constructor.
        folder: contains config.json and the weights.
        config: use this configuration instead of config.json.
        dtype: "bfloat16", "float16", "float32" or PyTorch's own; None or "auto": as config.json says, else as stored.
        device: None or "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:N".
        batch_invariant: see Decoder.
        use_safetensors: refuse pickled weights, which otherwise are read if there is nothing else.
        fast_on_cpu: with dtype None or "auto", a CPU that has no products of the checkpoint's dtype loads it in float32
            where memory allows.
        keep_quantised: quantised weights stay so in memory, where the ops take their form.
        quantization: "int4", "int8" or "fp8" quantises the weights that are read, with keep_quantised. The name of a
            method states what the checkpoint is; None: whatever it is.
        progress: show a progress bar on a terminal, and say if fast_on_cpu changes the dtype.

    Raises:
        FileNotFoundError: a file of the checkpoint is missing.
        ValueError: an unknown dtype or device; files that are damaged, or contradict each other or the configuration.
        MemoryError: the weights don't fit into the free memory of the device.
    """
    target, wanted = resolve_device(device), resolve_dtype(dtype)
    config = config or InternLM3Config.from_file(folder / "config.json")
    files = weights_of(folder, config) or WeightFiles.open(folder)
    if use_safetensors and any(path.suffix == ".bin" for path in files.headers):
        raise FileNotFoundError(
            f"{folder} contains only pickled weights, and use_safetensors=True asks for safetensors"
        )
    files.check_layers(config.num_hidden_layers)
    method = method_of(folder, config.extra)
    form = _form(quantization, folder, files, method)
    model = cls(_dense(config), device="meta")
    load_weights(
        model,
        files,
        method,
        dtype=wanted or DTYPES.get(config.dtype or ""),
        device=target,
        fast_on_cpu=fast_on_cpu and wanted is None,
        keep_quantised=keep_quantised,
        form=form,
        progress=progress,
    )
    model.model.batch_invariant = batch_invariant
    return model.eval()


def load_weights(
    module: nn.Module,
    files: WeightFiles,
    method: Method | None = None,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    fast_on_cpu: bool,
    keep_quantised: bool = False,
    form: Form | None = None,
    progress: bool,
) -> None:
    """Gives a module on the meta device its weights, as `dtype` (None: as they are stored), or as `cpu_dtype` has it.

    A parameter that the module has under two names may be stored under either; under both, they must be equal.
    `method` says how the files are quantised, None if they are not. With keep_quantised, quantised weights stay as they
    are where the ops take their form; all others are computed in float32 and rounded once, to `dtype`. With it, `form`
    quantises weights that are not.

    Raises:
        ValueError: files that are damaged, or whose tensors are not those of the module; the message names them.
        MemoryError: the weights don't fit into the free memory of the device.
    """
    stored = names_in(files)
    shapes, tied = parameters_in(files, module)
    if method is not None:
        files = QuantisedFiles.of(files, method, shapes)
    elif form is not None:
        files = RoundedFiles.of(files, form, shapes)
    check_parameters(files, shapes, tied)
    places: dict[str, Rows] = {}
    converted: list[str] = []
    if keep_quantised:
        # A head that is the embedding's stays as it is: tables of embeddings are not quantised.
        own = files.layouts.keys() - {*tied, *tied.values()}
        layouts = {name: files.layouts[stored(name)] for name in module.state_dict() if stored(name) in own}
        places = quantise_layers(module, layouts)
        converted = [name for name in linear_weights(module) if stored(name) in files.quantised]
    dtype = dtype or _stored_dtype(files)
    if fast_on_cpu and device.type == "cpu":
        dtype = cpu_dtype(dtype, partial(_bytes, module), report=progress)
    _check_memory(module, dtype, device)
    if converted and progress and sys.stderr is not None:
        others = f" and {len(converted) - 1} more weights are" if len(converted) > 1 else " is"
        to = str(dtype).removeprefix("torch.")
        print(
            f"{shown(converted[0])}{others} converted to {to}: see 'Quantised checkpoints' in runtime/README.md",
            file=sys.stderr,
        )

    _allocate(module, dtype, device)
    targets: dict[str, Any] = {stored(name): weight for name, weight in module.state_dict().items()}
    targets |= {stored(name): target for name, target in (*places.items(), *biases(places))}
    packed = {stored(name) for name in places}
    bar = tqdm(total=len(shapes), desc="Loading weights", unit="tensor", disable=hides_bar(progress))
    with bar:
        for path in files.headers:
            for name, weight in files.read(path, shapes.keys(), device, packed):
                targets[name].copy_(weight)
                bar.update()


def resolve_device(wanted: str | torch.device | Mapping[str, Any] | None) -> torch.device:
    """The device that a `device` or `device_map` argument names; None and "auto": the current GPU, else the CPU.

    Raises ValueError for several devices, or one that does not exist here.
    """
    if isinstance(wanted, Mapping):
        devices = set(map(str, wanted.values()))
        if len(devices) != 1:
            raise ValueError(f"device_map spreads the model over {sorted(devices)}; this runtime runs on one device")
        wanted = next(iter(wanted.values()))
    if wanted is None or wanted == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(wanted)  # type: ignore[arg-type]
    except (RuntimeError, TypeError):
        raise ValueError(f"device {wanted!r} is no device; give 'auto', 'cpu', 'cuda' or 'cuda:N'") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"device {wanted!r} does not exist: PyTorch sees {count} GPUs; give 'cpu' or another")
        return torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
    if device.type != "cpu":
        raise ValueError(f"device {wanted!r} is not supported; give 'auto', 'cpu' or 'cuda'")
    return device


def resolve_dtype(wanted: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype that a `dtype` argument names; None for None and "auto". Raises ValueError for an unsupported one."""
    if wanted is None or wanted == "auto":
        return None
    name = str(wanted).removeprefix("torch.")
    name = _ALIASES.get(name, name)
    if name not in DTYPES:
        raise ValueError(f"dtype {shown(wanted)} is not supported; give 'auto', {', '.join(map(repr, DTYPES))}")
    return DTYPES[name]


def _form(quantization: str | None, folder: Path, files: WeightFiles, method: Method | None) -> Form | None:
    """What to quantise the weights to. Raises ValueError for what the checkpoint is not, or cannot become."""
    quantised = method is not None or bool(files.layouts)
    if quantization is not None and not isinstance(quantization, str):
        raise TypeError(f"quantization must be a string, not {shown(quantization)}")
    if quantization in FORMS:
        if quantised:
            summary = method.summary if method is not None else "GGUF"
            raise ValueError(
                f"quantization={quantization!r}: {folder} is quantised already ({summary}): leave quantization away, "
                "or name the checkpoint that it was made from"
            )
        return quantization
    own = method.name if method is not None else "gguf" if files.layouts else None
    if quantization is not None and quantization.removesuffix("_marlin") != own:  # vLLM names its kernels, too
        raise ValueError(
            f"quantization {shown(quantization)}: {folder} is {shown(own) if own else 'not quantised'}. What a "
            f"checkpoint is needs no switch; {', '.join(map(repr, FORMS))} quantise one that is not"
        )
    return None


def _dense(config: InternLM3Config) -> InternLM3Config:
    """The configuration of the model in memory, which is not quantised."""
    values = config.to_dict()
    return (
        InternLM3Config.from_dict({key: value for key, value in values.items() if key != KEY})
        if KEY in values
        else config
    )


def _stored_dtype(files: WeightFiles) -> torch.dtype:
    """The dtype of the first tensor."""
    return next(dtype for header in files.headers.values() for _, dtype in header.values())


def _check_memory(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Raises MemoryError, with the arithmetic, if the weights don't fit into the free memory of a GPU."""
    if device.type != "cuda":
        return
    needed = _bytes(module, dtype)
    free, total = torch.cuda.mem_get_info(device)
    if needed > free:
        raise MemoryError(
            f"the weights need {needed / 1e9:.1f} GB in {dtype}, and {device} has {free / 1e9:.1f} GB free of "
            f"{total / 1e9:.1f}: free some, take a smaller dtype, or device='cpu'"
        )


def _bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """The memory of a module whose floating-point parameters have this dtype."""
    return sum(
        weight.numel() * (dtype if weight.is_floating_point() else weight.dtype).itemsize
        for weight in module.parameters()
    )


@torch.inference_mode(False)
def _allocate(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Gives a module on the meta device uninitialised memory, keeping tied parameters tied, and integers as they are.

    (`Module.to_empty` imports sympy, which takes half a second.)
    """
    allocated: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            if weight not in allocated:
                kept = dtype if weight.is_floating_point() else weight.dtype
                empty = torch.empty(weight.shape, dtype=kept, device=device)
                allocated[weight] = nn.Parameter(empty, requires_grad=False)
            setattr(part, name, allocated[weight])
