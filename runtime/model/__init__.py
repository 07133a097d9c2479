"""InternLM3's configuration, layers and decoder."""
