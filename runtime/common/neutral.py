"""transformers' keywords that this runtime accepts at the values that mean nothing here, and refuses at any other.

Code written for transformers passes many keywords at their defaults. Each table maps such a keyword to its neutral
values; None is neutral for every one of them. `without_neutral` drops them from what a caller gave.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from .checks import as_number
from .keywords import reject_unknown

Neutral = Mapping[str, tuple[Any, ...]]

# from_pretrained of a model, a configuration and a tokenizer, and LLM. trust_remote_code may be either, as no remote
# code is ever run.
LOAD: Neutral = {
    "trust_remote_code": (True, False),
    "force_download": (False,),
    "resume_download": (True, False),
    "proxies": ({},),
    "subfolder": ("",),
    "mirror": (),
    "variant": (),
    "gguf_file": (),
    "use_auth_token": (),
    "return_unused_kwargs": (False,),
}
LOAD_MODEL: Neutral = {
    **LOAD,
    "attn_implementation": ("sdpa", "eager"),
    "low_cpu_mem_usage": (True, False),
    "weights_only": (True,),
    "quantization_config": (),
    "load_in_8bit": (False,),
    "load_in_4bit": (False,),
    "max_memory": (),
    "offload_folder": (),
    "offload_state_dict": (False,),
    "offload_buffers": (False,),
    "ignore_mismatched_sizes": (False,),
    "output_loading_info": (False,),
    "from_tf": (False,),
    "from_flax": (False,),
    "state_dict": (),
    "key_mapping": (),
    "tp_plan": (),
    "tp_size": (),
    "device_mesh": (),
    "use_kernels": (False,),
    "adapter_kwargs": ({},),
}
LOAD_TOKENIZER: Neutral = {
    **LOAD,
    "use_fast": (True, False),
    "legacy": (True, False),
    "from_slow": (False,),
    "use_default_system_prompt": (False,),
    "spaces_between_special_tokens": (False,),
}
# save_pretrained of a model, a configuration and a tokenizer.
SAVE: Neutral = {
    "safe_serialization": (True,),
    "is_main_process": (True,),
    "push_to_hub": (False,),
    "legacy_format": (False,),
    "variant": (),
    "state_dict": (),
    "filename_prefix": (),
    "save_peft_format": (True, False),
}
# A model's forward.
FORWARD: Neutral = {
    "output_attentions": (False,),
    "return_dict": (True,),
    "cache_position": (),
    "token_type_ids": (),
    "head_mask": (),
}
# Calling a tokenizer, and its decode.
TOKENIZE: Neutral = {
    "stride": (0,),
    "is_split_into_words": (False,),
    "pad_to_multiple_of": (),
    "return_overflowing_tokens": (False,),
    "return_special_tokens_mask": (False,),
    "return_offsets_mapping": (False,),
    "return_length": (False,),
    "split_special_tokens": (False,),
    "text_target": (),
    "text_pair_target": (),
    "verbose": (True, False),
}
DETOKENIZE: Neutral = {"spaces_between_special_tokens": (False,)}

# generate: at another value these would change the tokens.
GENERATE_CHANGING: Neutral = {
    "num_beams": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "forced_bos_token_id": (),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "diversity_penalty": (0,),
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
# generate: these change how transformers computes the tokens, or what it keeps of a step, but not the tokens of one
# sequence decoded token by token.
GENERATE_IDLE: Neutral = {
    "use_cache": (True,),
    "early_stopping": (False,),
    "num_beam_groups": (1,),
    "length_penalty": (1,),
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
# generate: these change nothing in transformers either, given a prompt; any value is accepted.
GENERATE_NOTES = ("bos_token_id", "transformers_version")


def check_neutral(where: str, given: Mapping[str, Any], neutral: Neutral) -> None:
    """Raises ValueError for the first keyword of `neutral` that is given at another value than its neutral ones."""
    for name in given.keys() & neutral.keys():
        if not _is_neutral(given[name], neutral[name]):
            only = " or ".join(map(repr, neutral[name])) or "None"
            shown = " ".join(repr(given[name]).split())  # a model's repr fills a page
            shown = shown if len(shown) < 80 else f"{shown[:76]} ..."
            raise ValueError(f"{where}: {name}={shown} is not supported; it can only be {only} here")


def without_neutral(
    where: str,
    given: Mapping[str, Any],
    neutral: Neutral,
    *,
    known: Iterable[str] = (),
    counterparts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """`given` without the keywords of `neutral`: those that are left are all in `known`.

    Raises:
        ValueError: a keyword of `neutral` at a value that would mean something.
        TypeError: a keyword that is neither neutral nor known, or at such a value one with a counterpart; the message
            names that, or the nearest known one.
    """
    left = {name: value for name, value in given.items() if not _is_neutral(value, neutral.get(name))}
    check_neutral(where, {name: value for name, value in left.items() if name not in (counterparts or {})}, neutral)
    reject_unknown(where, left, known, counterparts)
    return left


def _is_neutral(value: Any, allowed: tuple[Any, ...] | None) -> bool:
    """Whether a keyword with these neutral values, or none as it is not in a table, may have this value.

    A number may be of any type; 1 and True are different values.
    """
    if allowed is None or value is None:
        return allowed is not None
    number = as_number(value)
    if number is not None:
        return any(number == other and not isinstance(other, bool) for other in allowed)
    return any(type(value) is type(other) and value == other for other in allowed)
