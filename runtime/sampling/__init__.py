"""What a caller may ask for when the next token is chosen, and how it is checked."""
