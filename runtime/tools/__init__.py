"""Tools of a chat: their schemas and calls in a prompt, calls in an answer, and the schema of a call that is forced."""
