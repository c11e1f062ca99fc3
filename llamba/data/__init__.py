"""Rows to tokens to batches; preference pairs; chat templates."""
