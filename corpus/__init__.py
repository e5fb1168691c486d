"""Text and task data: documents, token shards, task files, prompts. May import common and model."""
