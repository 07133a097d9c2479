"""The command line: `internlm3 demo`, `chat`, `generate` and `info`."""
