"""What a Python user touches: LLM, its outputs and published system prompts."""
