"""Talking to a model, and the engines that answer prompts."""
