"""What control tokens are for, so that two vocabularies can be matched by purpose where the names differ."""

from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Any

# Of several that one vocabulary has, the first is what its answers end with: Llama's <|eom_id|> only hands over to a tool.
ENDS_OF_TURN = (
    "<|im_end|>", "<|eot_id|>", "<|eot|>", "<|end|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>", "<|return|>", "<|eom_id|>", "<|eom|>",
)  # fmt: skip
ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<｜end▁of▁sentence｜>", "<EOS_TOKEN>")


class Role(StrEnum):
    """What a control token does in an answer."""

    END_OF_TURN = "end of turn"
    END_OF_TEXT = "end of text"
    OTHER = "other"


def roles(names: Mapping[int, str], *, ends: Collection[int] = (), turn: int | None = None) -> dict[int, Role]:
    """The role of each control token by name; `ends` are known to end texts, `turn` is what a chat template ends a turn with."""
    found = {}
    for token, name in names.items():
        if token == turn or name in ENDS_OF_TURN:
            found[token] = Role.END_OF_TURN
        elif token in ends or name in ENDS_OF_TEXT:
            found[token] = Role.END_OF_TEXT
        else:
            found[token] = Role.OTHER
    return found


def template_end(tokenizer: Any) -> int | None:
    """The first control token that the chat template writes after an answer, None without one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Yes."}]
    try:
        tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("Yes.")[2]
    except Exception:  # templates raise what their authors chose
        return None
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((i for i in tokenizer(tail, add_special_tokens=False).input_ids if i in special), None)


def matched(remote: Mapping[int, Role], small: Mapping[int, Role], remote_tokens: Any, small_tokens: Any) -> dict[int, int]:
    """The small side's counterpart of the remote's control tokens.

    By name where both have it, else by role, of several ends the one that answers end with; a remote that ends turns finds the small
    side's end of text where that has no other end. What is left out has no counterpart.
    """
    names = {small_tokens[token]: token for token in small}
    found = {token: names[remote_tokens[token]] for token in remote if remote_tokens[token] in names}
    taken = set(found.values())
    for role in (Role.END_OF_TURN, Role.END_OF_TEXT):
        free = [token for token, its in small.items() if its is role and token not in taken]
        if role is Role.END_OF_TURN and not any(its is role for its in small.values()):
            free = [token for token, its in small.items() if its is Role.END_OF_TEXT and token not in taken]
        if not free:
            continue
        wanting = [token for token, its in remote.items() if its is role and token not in found]
        if wanting and not any(remote[token] is role for token in found):
            mine = min(wanting, key=lambda token: _rank(remote_tokens[token]))
            found[mine] = min(free, key=lambda token: _rank(small_tokens[token]))
            taken.add(found[mine])
    return found


def ends_answers(found: Mapping[int, Role], tokens: Any) -> int | None:
    """The token that answers end with: an end of turn, else an end of text; None without either."""
    for role in (Role.END_OF_TURN, Role.END_OF_TEXT):
        if ends := [token for token, its in sorted(found.items()) if its is role]:
            return min(ends, key=lambda token: _rank(tokens[token]))
    return None


def _rank(name: bytes) -> int:
    """How far down the lists a name stands; what only a template or a configuration knows as an end comes before them."""
    known = (*ENDS_OF_TURN, *ENDS_OF_TEXT)
    text = name.decode(errors="replace")
    return known.index(text) if text in known else -1
