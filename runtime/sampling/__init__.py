"""How the next token is chosen: the settings a caller may give, their checks, and logits processors."""
