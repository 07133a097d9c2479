"""Computes the expected logits, of the reference and of transformers, and of the known faults."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from .check import DATA, errors
from .folder import write
from .generated import generated
from .runs import RUNS, computed, faults_of


def record() -> None:
    """Writes data/expected.safetensors, and prints the errors of transformers and of the faults at every place."""
    made: dict[str, torch.Tensor] = {}

    def add(run: str, name: str, rows: torch.Tensor) -> None:
        made[f"{run}/{name}"] = rows.contiguous()
        off = errors(rows, made[f"{run}/right"]).tolist()
        print(f"{run:17} {name:13}", *(f"{error:8.1e}" for error in off), flush=True)

    for run in RUNS:
        add(run, "right", computed(run))
        for name, fault in faults_of(run).items():
            add(run, name, computed(run, fault).float())
    save_file(made, DATA / "expected.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        # A model for each run: after a longer sequence transformers keeps its base for a prompt that fills the window.
        theirs = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for _ in range(2)]
        add("prompts", "transformers", generated(theirs[0], "prompts"))
        add("decode-rederived", "transformers", generated(theirs[1], "decode-rederived"))
    save_file(made, DATA / "expected.safetensors")
