"""Chat templates: messages are checked and rendered to a prompt, in a sandbox."""
