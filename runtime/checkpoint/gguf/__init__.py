"""GGUF files, the format of llama.cpp: one file with the configuration, the tokenizer and the weights."""
