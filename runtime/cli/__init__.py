"""The command line: `internlm3 demo`, `chat`, `generate`, `info`, and the terminal they write to."""
