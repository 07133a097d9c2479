"""Text to token ids and back: the tokenizer, its files and vocabularies, and streaming text."""
