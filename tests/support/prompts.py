"""Real prompts, and prompts of different lengths as one padded batch."""

import torch

QUESTIONS = [
    "What is the capital of France?",
    "Explain photosynthesis to a ten-year-old.",
    "Write a haiku about the sea.",
    "中国的首都是哪里？",
    "请用一句话介绍人工智能。",
    "What is 17 * 23?",
    "Give me three tips for sleeping better.",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
]

TEXTS = [
    "The quick brown fox",
    "Once upon a time, in a village at the foot of the mountains, there lived",
    "In 1969, the first human beings to walk on the Moon were",
    "My favourite condiment is",
    "The French Revolution began in",
    "To be, or not to be, that is the question:",
    "Water boils at a temperature of",
    "The three primary colours are red,",
    "Dear Sir or Madam,\n\nI am writing to complain about",
    "Ingredients:\n- 2 eggs\n- 100 g of flour\n- a pinch of salt\n\nMethod:\n1.",
    "Q: Who wrote Hamlet?\nA:",
    "Abstract. We present a new method for",
    "BREAKING NEWS: scientists have",
    "The opposite of hot is",
    "She opened the letter with trembling hands and read:",
    "Monday, Tuesday, Wednesday,",
    "The mitochondria is the powerhouse of",
    "According to the World Health Organization,",
    "A list of European countries: Austria, Belgium,",
    "It was a bright cold day in April, and the clocks were striking",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "import numpy as np\n\ndef softmax(x):\n",
    "SELECT name, age FROM users WHERE",
    "for (int i = 0; i < n; i++) {\n",
    "#!/bin/bash\n# back up a folder\n",
    "<html>\n<head>\n<title>",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    '{"name": "Alice", "age": 30, "city": ',
    "git commit -m",
    "The derivative of x^2 is",
    "If 3x + 5 = 20, then x =",
    "The sum of the first 100 positive integers is",
    "2, 3, 5, 7, 11, 13,",
    "Theorem. There are infinitely many primes.\nProof.",
    "今天天气很好，我们",
    "人工智能是",
    "从前有一座山，山里有",
    "床前明月光，",
    "Bonjour, je m'appelle",
    "🙂 emoji: 🎉 means",
]

# Three prompts for a model with a vocabulary of 50.
PROMPTS = torch.tensor([[7, 8, 9, 10, 11, 12], [20, 33, 41, 6, 18, 49], [1, 1, 3, 3, 4, 4]])


def padded(rows, pad, left):
    """[B, T] ids and their mask."""
    width = max(map(len, rows))
    fill = [(width - len(row)) * [pad] for row in rows]
    ids = [gap + row if left else row + gap for gap, row in zip(fill, rows, strict=True)]
    gaps = [[0] * len(gap) for gap in fill]
    mask = [gap + [1] * len(row) if left else [1] * len(row) + gap for gap, row in zip(gaps, rows, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def real_prompts(tokenizer):
    """50 prompts as token ids: chats, texts to continue, code, maths, Chinese."""
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        for question in QUESTIONS
    ]
    prompts = chats + [tokenizer.encode(text) for text in TEXTS]
    assert len(prompts) == 50 and len({tuple(prompt) for prompt in prompts}) == 50
    return prompts
