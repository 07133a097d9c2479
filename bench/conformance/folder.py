"""The folder that a runtime loads."""

import hashlib
import json
import shutil
from pathlib import Path

from .check import DATA
from .checkpoint import CONFIG, safetensors, token_ids

# Of model.safetensors and token_ids.json, on every machine.
SHA256 = {
    "model.safetensors": "8a1943747837b5503d54015beb25a5b1d685908f029036eb43b8453df85595bf",
    "token_ids.json": "583608410352df86791ee2826f7a38773fa002e0d2987124b83f1604023cd6df",
}


def write(folder: Path) -> None:
    """Makes the folder: checkpoint, tokenizer, token ids, cases of the tokenizer and expected logits.

    Raises:
        FileExistsError: the folder has files.
        ValueError: this machine made other bytes than every other one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} has files already: name a new folder")
    made = {"model.safetensors": safetensors(), "token_ids.json": json.dumps(token_ids()).encode()}
    for name, content in made.items():
        if hashlib.sha256(content).hexdigest() != SHA256[name]:
            raise ValueError(f"{name} came out with other bytes than it must have: numpy or Python is damaged")
        (folder / name).write_bytes(content)
    settings = {"config.json": CONFIG, "generation_config.json": {"eos_token_id": [2, 376], "pad_token_id": 2}}
    for name, values in settings.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    for path in DATA.iterdir():
        shutil.copy(path, folder)
