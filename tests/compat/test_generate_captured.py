"""The whole suite of `generate` once more, its steps replayed from graphs and 1 to 4 of them under way."""

from internlm3.tests.compat.test_generate import *  # noqa: F403
from internlm3.tests.support.capture import depth, engines  # noqa: F401 (fixtures)

# Fifty real prompts one after the other take a minute and a half; in two ragged batches they are all here too.
del test_greedy_tokens_are_those_of_transformers  # noqa: F821
