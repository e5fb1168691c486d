"""Training data: documents, token shards, raw and preprocessed task files, prompts. It may import common and model."""
