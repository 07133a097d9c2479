"""Files of requests in OpenAI's batch format: `internlm3 batch`. Needs the extra `server`, whose app answers them."""
