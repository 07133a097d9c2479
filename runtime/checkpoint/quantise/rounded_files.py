"""The files of a checkpoint that is quantised while it is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ....kernels import quantised as kernels
from ....kernels.quantised import Layout, Weight
from ..weight_files import WeightFiles, naming
from .rounding import GROUPS, Form, form_of, group_size, to_integers


@dataclass(frozen=True)
class RoundedFiles(WeightFiles):
    """Files whose linear layers can be read as `form`, rounded to the nearest.

    Attributes:
        stored: the files as they are.
        form: see `rounding`; int4 is in groups of 128 inputs, or fewer where 128 does not divide them.
    """

    stored: WeightFiles
    form: Form

    @classmethod
    def of(cls, stored: WeightFiles, form: Form, shapes: Mapping[str, tuple[int, ...]]) -> RoundedFiles:
        """Raises ValueError for a layer that cannot be rounded to this form.

        Args:
            stored: the files of the checkpoint.
            form: of the projections; the head is int8.
            shapes: of the parameters of the model, by their names in the files.
        """
        layouts = {}
        for name, shape in shapes.items():
            own = form_of(name, form)
            if own is not None and len(shape) == 2:
                with naming(stored.folder):
                    layouts[name] = Layout(_form(name, own, shape[1]), None)
        return cls(stored.folder, stored.headers, stored.file_of, layouts, stored, form)

    def read(
        self, path: Path, names: Collection[str], device: torch.device, packed: Collection[str] = ()
    ) -> Iterator[tuple[str, Weight]]:
        for name, tensor in self.stored.read(path, names, device):
            own = form_of(name, self.form)
            if name in packed and own is not None and isinstance(tensor, Tensor):  # nothing is stored quantised
                # Zero points are in the low bits of the scales, which float32 would need for itself.
                dtype = torch.bfloat16 if tensor.dtype == torch.float32 else tensor.dtype
                with naming(path):
                    integers = to_integers(name, tensor, dtype, own, GROUPS[0], False)
                yield name, integers.as_weight(packed=True)
            else:
                yield name, tensor


def _form(name: str, form: Form, inputs: int) -> kernels.Form:
    if form == "int4":
        return kernels.Form("int4", inputs, group_size(name, inputs, GROUPS[0]), None)
    return kernels.Form("int8" if form == "int8" else "float8", inputs, 0, 0)
