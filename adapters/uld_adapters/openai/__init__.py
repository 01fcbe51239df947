"""Servers of the OpenAI kind: tokens as bytes or strings, answers continued by a message, by text, or not at all."""
