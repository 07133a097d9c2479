"""The code block of InternLM3's model page, run as a stranger would: only imports and checkpoint are changed."""

import re
import textwrap
from pathlib import Path
from typing import Any

import torch

# The page's block, copied as it is published (its prompts of a session, ">>> ", included).
PAGE = '''
```python
>>> from transformers import AutoModelForCausalLM, AutoTokenizer
>>> device = "cuda" # the device to load the model onto

>>> tokenizer = transformers.InternLM3Tokenizer.from_pretrained("internlm/internlm3-8b-instruct")
>>> model = transformers.InternLM3ForCausalLM.from_pretrained("internlm/internlm3-8b-instruct", device_map="auto")
>>> model = model.eval()

>>> system_prompt = """You are an AI assistant whose name is InternLM (书生·浦语).
    - InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.
    - InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as English and 中文."""
>>> messages = [
    {"role": "system", "content": system_prompt},
    {"role": "user", "content": "Please tell me five scenic spots in Shanghai"},
]
>>> tokenized_chat = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_tensors="pt")
>>> generated_ids = model.generate(tokenized_chat, max_new_tokens=1024, temperature=1, repetition_penalty=1.005, top_k=40, top_p=0.8)

>>> generated_ids = [
    output_ids[len(input_ids):] for input_ids, output_ids in zip(tokenized_chat, generated_ids)
]
>>> prompt = tokenizer.batch_decode(tokenized_chat)[0]
>>> print(prompt)
>>> response = tokenizer.batch_decode(generated_ids)[0]
>>> print(response)
```
'''  # noqa: E501
IMPORT = "from transformers import AutoModelForCausalLM, AutoTokenizer"


def block(imports: str, checkpoint: Path) -> str:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    code = re.sub(r"^>>> ", "", code, flags=re.MULTILINE)
    assert code.count(IMPORT) == 1
    code = code.replace(IMPORT, imports)
    if "as transformers" not in imports:
        code = code.replace("transformers.InternLM3", "InternLM3")
    return code.replace("internlm/internlm3-8b-instruct", str(checkpoint))


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "stranger"}
    torch.manual_seed(0)
    exec(code, names)
    return names


def test_the_page_runs(demo_model, capsys):
    names = run(block("from internlm3 import InternLM3Tokenizer, InternLM3ForCausalLM", demo_model))
    tokenizer, chat, [answer] = names["tokenizer"], names["tokenized_chat"], names["generated_ids"]
    assert isinstance(chat, torch.LongTensor)
    assert chat.dim() == 2 and chat.shape[0] == 1
    assert isinstance(answer, torch.LongTensor) and 1 <= len(answer) <= 1024

    expected = textwrap.dedent(
        """\
        <|im_start|>system
        {system}<|im_end|>
        <|im_start|>user
        Please tell me five scenic spots in Shanghai<|im_end|>
        <|im_start|>assistant
        """
    ).format(system=names["system_prompt"])
    assert names["prompt"] == expected
    assert names["response"] == tokenizer.decode(answer)
    assert capsys.readouterr().out == f"{names['prompt']}\n{names['response']}\n"
    # A chat model ends its answer by itself, well before 1024 tokens, and speaks of what it was asked.
    assert names["response"].endswith("<|im_end|>") and "Shanghai" in names["response"]


def test_the_page_runs_with_the_module_in_the_place_of_transformers(demo_model, capsys):
    """Its first tokens: the names are the same, and so is what they do."""
    code = block("import internlm3 as transformers", demo_model)
    names = run(code.replace("max_new_tokens=1024", "max_new_tokens=4"))
    assert capsys.readouterr().out == f"{names['prompt']}\n{names['response']}\n"
    assert len(names["generated_ids"][0]) == 4
