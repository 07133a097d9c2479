"""The server of OpenAI's API: `internlm3 serve`. Needs the extra `server`."""
