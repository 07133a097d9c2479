"""A stand-in for CUDA graphs on machines without a GPU: records the ops of a step, and replays them without its Python.

As in a CUDA graph, host values of the first run are frozen, and every tensor stays where it is. What a capture forbids
is an error: reading a tensor's value on the host, and, since a step is kernels only, any op of PyTorch but a view.
"""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from internlm3 import kernels
from internlm3.kernels import cpu
from internlm3.runtime.engine import shared
from internlm3.runtime.engine.engine import Engine
from internlm3.runtime.model import model as runtime_model


class NoHostReads(TorchDispatchMode):
    """Raises on every op of PyTorch that a captured step must not have."""

    def __init__(self, only_reads: bool):
        super().__init__()
        self._only_reads = only_reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            raise RuntimeError(f"{func} in a step reads a value on the host, which a graph would freeze")
        if not self._only_reads and not func.is_view:
            raise RuntimeError(f"{func} in a step runs between its kernels")
        return func(*args, **(kwargs or {}))


class Recorder:
    """The ops of models, a backend's, recorded while a step is captured.

    nodes: (name, op, arguments, keywords, results) of the last capture. replays: how many there were.
    """

    def __init__(self, monkeypatch: Any, ops: Any = cpu):
        self.nodes: list[tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self.replays = 0
        self._recording = False
        self._only_reads = False

        class Ops:
            def __getattr__(_, name: str) -> Any:
                found = getattr(ops, name)
                return self.op(found) if name in kernels.__all__ else found

        monkeypatch.setattr(runtime_model, "for_device", lambda device: Ops())

    def op(self, op: Callable[..., Any]) -> Callable[..., Any]:
        """`op`, so that it is a node of the step in which it is called."""

        def node(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                out = op(*args, **kwargs)
            if self._recording:
                self.nodes.append((op.__name__, op, args, kwargs, out))
            return out

        return node

    @contextlib.contextmanager
    def allowing_torch(self) -> Any:
        """Inside, a step may have ops of PyTorch, which no replay repeats."""
        self._only_reads = True
        yield
        self._only_reads = False

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """A `Capture`, as `cuda_graphs()` gives one."""
        self.nodes = nodes = []
        self._recording = True
        try:
            with NoHostReads(self._only_reads):
                step()
        finally:
            self._recording = False

        def replay() -> None:
            self.replays += 1
            for _, op, args, kwargs, out in nodes:
                for old, new in zip(tree_leaves(out), tree_leaves(op(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)

        return replay


class CapturedEngines:
    """Makes every engine that LLM and `generate` use capture its steps; those with several in flight verify drafts.

    Attributes:
        recorder: records the ops of all models.
    """

    def __init__(self, monkeypatch: Any, depth: int):
        self.recorder = recorder = Recorder(monkeypatch)
        self._made = made = weakref.WeakSet()

        class Captured(Engine):
            def __init__(engine, *args: Any, **options: Any):
                own = {"capture": recorder.capture, "depth": depth, "speculation": depth > 1}
                super().__init__(*args, **{**options, **own})
                made.add(engine)

        monkeypatch.setattr(shared, "Engine", Captured)

    def forget(self) -> None:
        """Drops all captured steps: what a test patches is captured anew."""
        for engine in self._made:
            engine._runner._steps._captured.clear()
            engine._runner._prefill.captured._chunks.clear()
            engine._runner._prefill.captured._first_tokens.clear()


@pytest.fixture(scope="module", params=[None, 1, 3], ids=["eager", "captured, depth 1", "captured, depth 3, drafts"])
def capture(request: pytest.FixtureRequest) -> Any:
    """Runs the module's tests with eager steps, and with captured ones of which up to 3 are in flight, with drafts.

    None, or the CapturedEngines.
    """
    if request.param is None:
        yield None
        return
    with pytest.MonkeyPatch.context() as patch:
        yield CapturedEngines(patch, request.param)


@pytest.fixture
def as_op(capture: Any) -> Any:
    """Turns a function into an op that a captured step can hold."""
    if capture is None:
        return lambda function: function

    def as_op(function: Any) -> Any:
        capture.forget()
        return capture.recorder.op(function)

    return as_op


@pytest.fixture(autouse=True)
def nothing_captured(capture: Any) -> Any:
    """What a test patches is captured anew, and forgotten after it."""
    if capture is not None:
        capture.forget()
    yield
    if capture is not None:
        capture.forget()
