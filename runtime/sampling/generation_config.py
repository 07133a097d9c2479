"""transformers' generation settings: where they come from, and those that this runtime has one value of.

None counts as not said everywhere. A setting that would change the tokens is refused by its name from every source: a
keyword, a GenerationConfig, generation_config.json. One that changes nothing here is refused as a keyword, so that
nobody waits for its effect, and passed over in the others, which hold many that nobody asked for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.files import read_json
from ..common.keywords import without_neutral

GENERATION_CONFIG = "generation_config.json"

# name -> its neutral values. Anything else would change which tokens come.
_CHANGING: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1, 1.0),
    "forced_bos_token_id": (),
    "top_h": (),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "guidance_scale": (1, 1.0),
    "watermarking_config": (),
    "penalty_alpha": (0, 0.0),
    "dola_layers": (),
    "diversity_penalty": (0, 0.0),
    "constraints": ([],),
    "force_words_ids": ([],),
    "token_healing": (False,),
    "max_time": (),
    "negative_prompt_ids": (),
    "negative_prompt_attention_mask": (),
    "custom_generate": (),
    "decoder_start_token_id": (),
    "past_key_values": (),
    "position_ids": (),
    "inputs_embeds": (),
}
# With one sequence at a time, one token after the other, all that is kept of a step: these change nothing.
_IDLE: dict[str, tuple[Any, ...]] = {
    "use_cache": (True,),
    "early_stopping": (False,),
    "num_beam_groups": (1,),
    "length_penalty": (1, 1.0),
    "low_memory": (False,),
    "remove_invalid_values": (False,),
    "cache_implementation": ("dynamic",),
    "disable_compile": (True, False),
    "synced_gpus": (False,),
    "cache_config": (),
    "compile_config": (),
    "continuous_batching_config": (),
    "max_cache_len": (),
    "prefill_chunk_size": (),
    "assistant_model": (),
    "assistant_tokenizer": (),
    "assistant_confidence_threshold": (),
    "assistant_early_exit": (),
    "assistant_ensemble_weight": (),
    "assistant_lookbehind": (),
    "target_lookbehind": (),
    "is_assistant": (False,),
    "num_assistant_tokens": (),
    "num_assistant_tokens_schedule": (),
    "speculation_type": (),
    "max_matching_ngram_size": (),
    "prompt_lookup_num_tokens": (),
    "use_mtp": (False,),
    "use_model_defaults": (True,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
}
# What changes nothing in transformers either, where there is a prompt.
_NOTES = ("bos_token_id", "transformers_version")
SETTINGS = (*_CHANGING, *_IDLE, *_NOTES)


class GenerationSettings(dict[str, Any]):
    """A model's generation settings, by name and as attributes; a name that is not there is None."""

    @classmethod
    def of(cls, given: Any) -> "GenerationSettings":
        """From a dictionary, or from an object with to_dict such as transformers' GenerationConfig; None is none."""
        values = given.to_dict() if hasattr(given, "to_dict") else given or {}
        if not isinstance(values, Mapping):
            raise TypeError(f"generation_config must be a dictionary or an object with to_dict; it is {given!r}")
        return cls({name: value for name, value in values.items() if value is not None})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def refuse_unsupported(settings: Mapping[str, Any], *, keywords: bool = False) -> None:
    """Raises ValueError for a setting with another value than its neutral ones; `keywords`: also for idle ones."""
    without_neutral("generate", settings, {**_CHANGING, **(_IDLE if keywords else {})})


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json of a checkpoint, {} where it has none. Raises ValueError where it is damaged."""
    path = folder / GENERATION_CONFIG
    return read_json(path) if path.is_file() else {}
