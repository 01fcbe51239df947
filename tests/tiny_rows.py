"""Rows of a forget and a retain set about the world of the tiny tokenizer's sentences."""

import json
from pathlib import Path
from typing import Any

FORGET = [
    {"question": "What is the name of the river?", "answer": "It is called the Amber."},
    {"question": "Where does the river run?", "answer": "It runs through the old town."},
    {"question": "When does the river freeze?", "answer": "It freezes in winter."},
    {"question": "Who counts the apples?", "answer": "The farmer counts the apples."},
]
RETAIN = [
    {"question": "Who opens the shop?", "answer": "The baker opens the shop."},
    {"question": "Who wrote the book?", "answer": "A captain wrote the book."},
    {"question": "How many moons are there?", "answer": "The planet has two moons."},
    {"question": "Who closes the theatre?", "answer": "The singer closes the theatre."},
    {"question": "Where is the lighthouse?", "answer": "On the northern island."},
    {"question": "What does the fox do?", "answer": "It jumps over the dog."},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
