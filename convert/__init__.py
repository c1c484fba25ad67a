"""Checkpoints in, GGUF out."""
