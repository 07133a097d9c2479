"""Text into token ids and back: the tokenizer, its vocabularies, and the chat templates that a prompt is made with."""
