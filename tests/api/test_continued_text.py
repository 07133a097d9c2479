"""An answer's text continues its prompt's; a chat answer is a text of its own."""

import pytest

from internlm3 import LLM
from internlm3.tests.support.llm import text_of
from internlm3.tests.support.tokenizers import TRAINED, processor_of, train, write_checkpoint

PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def prefixing(make, tmp_path_factory):
    """A random model whose SentencePiece vocabulary puts a space before every text."""
    folder = make()
    write_checkpoint(folder, train(TRAINED["dummy"]), add_bos_token=True)
    return LLM(folder, progress=False)


def test_prompt_and_text_are_the_text_of_all_tokens(prefixing):
    processor = processor_of(train(TRAINED["dummy"]))
    word = processor.piece_to_id("▁dog")
    settings = {"max_tokens": 4, "allowed_token_ids": [word, processor.piece_to_id("er")], "logit_bias": {word: 99.0}}
    for prompt in (PROMPT, "A tokenizer turns text into numbers; "):
        output = prefixing.generate(prompt, **settings)
        assert output.text.startswith(" dog")
        whole = processor.decode([id for id in output.prompt_token_ids + output.outputs[0].token_ids if id > 2])
        assert prompt + output.text == whole
        assert prefixing.generate(output.prompt_token_ids, **settings).text == output.text
        assert text_of([*prefixing.stream(prompt, **settings)]) == output.text
        stopped = prefixing.generate(prompt, stop=" dog", **settings).outputs[0]
        assert (stopped.text, stopped.stop_reason, len(stopped.token_ids)) == ("", " dog", 1)
    # A text without words before it, and a chat answer, begin without the space.
    assert prefixing.generate([1], **settings).text.startswith("dog")
    assert prefixing.chat("What?", **settings).text.startswith("dog")
    assert text_of([*prefixing.stream([{"role": "user", "content": "What?"}], **settings)]).startswith("dog")


def test_the_words_of_an_answer(tiny, script):
    """By a vocabulary without a prefix, whose words have their space in front."""
    tokens = tiny.tokenizer.encode(" Paris, of course", add_special_tokens=False)
    script(tokens)
    assert tiny.generate("The capital of France is", max_tokens=len(tokens)).text == " Paris, of course"
    script(tokens)
    assert text_of([*tiny.stream("The capital of France is", max_tokens=len(tokens))]) == " Paris, of course"
