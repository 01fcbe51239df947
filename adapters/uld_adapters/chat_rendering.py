"""How a server itself renders a conversation: asked for, where it tells, to be compared with a template that came from elsewhere."""

from collections.abc import Callable, Sequence
from typing import Any

from uld_adapters.errors import BackendError, RequestRejected
from uld_adapters.served import ServedBackend

PROBE = ({"role": "user", "content": "Hello"},)

# Each server's route, and what it answers as text or as ids.
_ROUTES: dict[str, tuple[str, dict[str, Any], Callable[[Any], str | list[int]]]] = {
    "tgi": ("/chat_tokenize", {}, lambda answer: str(answer["templated_text"])),
    "vllm": ("/tokenize", {"add_generation_prompt": True}, lambda answer: [int(i) for i in answer["tokens"]]),
    "llamacpp": ("/apply-template", {}, lambda answer: str(answer["prompt"])),
}


async def renders_alike(backend: object, tokenizer: Any) -> bool | None:
    """Whether the server's own chat template gives a message the same form as the tokenizer's; None where it does not tell."""
    if not isinstance(backend, ServedBackend) or backend.name not in _ROUTES:
        return None
    path, more, read = _ROUTES[backend.name]
    body: dict[str, Any] = {"messages": list(PROBE), **more} | ({"model": backend.model} if backend.model else {})
    try:
        theirs = read(await backend.http.request("POST", path, body))
    except BackendError as error:
        if error.retryable:
            raise
        neither = isinstance(error, RequestRejected) and not tokenizer.chat_template
        return True if neither else None
    except (KeyError, TypeError, ValueError):
        return None
    if not tokenizer.chat_template:
        return False
    if isinstance(theirs, str):
        ours = tokenizer.apply_chat_template(list(PROBE), tokenize=False, add_generation_prompt=True)
        return _without_start(theirs, tokenizer) == _without_start(ours, tokenizer)
    return theirs == _ids(tokenizer)


def _ids(tokenizer: Any) -> Sequence[int]:
    return list(tokenizer.apply_chat_template(list(PROBE), add_generation_prompt=True, return_dict=True)["input_ids"])


def _without_start(text: str, tokenizer: Any) -> str:
    """Some servers leave the first token of every text out of the text that they tell."""
    return text.removeprefix(tokenizer.bos_token or "")
