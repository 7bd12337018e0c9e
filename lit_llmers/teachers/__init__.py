"""What only LLMs need: loading and truncating a base, adapters, prompts."""
