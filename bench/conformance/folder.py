"""The folder that a runtime loads."""

import hashlib
import json
import shutil
from pathlib import Path

from .check import DATA
from .checkpoint import CONFIG, safetensors, token_ids

# Of model.safetensors and token_ids.json, on every machine.
SHA256 = {
    "model.safetensors": "1a6e8480dc004f5ddffbdcc9129f839b355f4d3b8c075db66a99c57116a077c6",
    "token_ids.json": "b35516d1f23ee9b9a30b0bc6352f57680419ab3d887e4dfb7f7d8b3dd01716bb",
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
    for name, content in settings.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    for path in DATA.iterdir():
        shutil.copy(path, folder)
