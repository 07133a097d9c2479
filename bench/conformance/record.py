"""Computes the expected logits, of the reference and of transformers, and of the known faults."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from .check import DATA, errors
from .checkpoint import PLACES, WINDOW
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
            add(run, name, computed(run, fault, dtype=torch.float32))
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        add("prompts", "transformers", generated(theirs, "prompts"))
        steps = generated(theirs, "decode-rederived", [place for place in PLACES if place >= WINDOW - 1])
        first = made["prompts/transformers"][: len(PLACES) - len(steps)]
        add("decode-rederived", "transformers", torch.cat((first, steps)))
    save_file(made, DATA / "expected.safetensors")
