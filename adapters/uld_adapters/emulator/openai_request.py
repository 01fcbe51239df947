"""Requests of the OpenAI dialect: checked against the limits, and refused with the words of the real API."""

import secrets
from dataclasses import dataclass

from uld_adapters.emulator.desk import Limits
from uld_adapters.emulator.engine import Engine
from uld_adapters.emulator.openai_bodies import ChatRequest, Common, CompletionRequest, no_model, refusal
from uld_adapters.emulator.sampling import Warp

COMPLETIONS_TOP = 5  # the largest k of the older route, whatever the newer one gives
MAX_STOP = 4
DEFAULT_COMPLETION = 16


@dataclass(frozen=True)
class Plan:
    """A validated request; `top` is k at each position, None without log-probabilities; `before` is text to be echoed."""

    ids: list[int]
    max_tokens: int
    warp: Warp
    seed: int | None
    top: int | None
    stop: tuple[str, ...]
    before: str = ""
    echo: bool = False


def _in_range(body: Common) -> None:
    ranges = {"temperature": (0, 2), "top_p": (0, 1), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2)}
    for name, (low, high) in ranges.items():
        value = getattr(body, name)
        if value is not None and not low <= value <= high:
            side, bound, sign = ("above maximum", high, "<=") if value > high else ("below minimum", low, ">=")
            code = f"decimal_{'above_max' if value > high else 'below_min'}_value"
            text = f"Invalid '{name}': decimal {side} value. Expected a value {sign} {bound}, but got {value} instead."
            raise refusal(text, param=name, code=code)


def _common(body: Common, engine: Engine, limits: Limits) -> tuple[Warp, int | None, tuple[str, ...]]:
    """The sampling options, the seed (None: greedy) and the stop strings."""
    if body.model != limits.model_id:
        raise no_model(body.model)
    _in_range(body)
    if (body.n or 1) != 1 or body.presence_penalty or body.frequency_penalty:
        raise refusal("n above 1 and penalties are not emulated", code="unsupported_value")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stop) > MAX_STOP:
        text = f"Invalid 'stop': array too long. Expected an array with maximum length {MAX_STOP}"
        raise refusal(f"{text}, but got an array with length {len(stop)} instead.", param="stop", code="array_above_max_length")
    if body.stream_options is not None and not body.stream:
        raise refusal("The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options")
    bias: dict[int, float] = {}
    for key, value in (body.logit_bias or {}).items():
        if not key.isdecimal() or int(key) >= engine.rows:
            raise refusal(f"Invalid key in 'logit_bias': {key}. Keys are token ids below {engine.rows}.", param="logit_bias")
        bias[int(key)] = min(100.0, max(-100.0, value))
    temperature = 1.0 if body.temperature is None else body.temperature
    if temperature == 0 or body.top_p == 0:
        return Warp(bias=bias), None, stop
    named = limits.seed if body.seed is None else body.seed
    return Warp(temperature, top_p=body.top_p, bias=bias), secrets.randbits(63) if named is None else named, stop


def _room(prompt: int, asked: int | None, limits: Limits, where: str) -> int:
    longest = limits.max_total_tokens
    wanted = max(longest - prompt, 1) if asked is None else asked
    if wanted < 1:
        text = f"Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, but got {wanted} instead."
        raise refusal(text, param="max_tokens", code="integer_below_min_value")
    if prompt + wanted > longest:
        text = f"This model's maximum context length is {longest} tokens. However, you requested {prompt + wanted} tokens"
        text += f" ({prompt} in the {where}, {wanted} in the completion). Please reduce the length of the {where} or completion."
        raise refusal(text, param=where, code="context_length_exceeded")
    return wanted


def check_chat(body: ChatRequest, engine: Engine, limits: Limits) -> Plan:
    """Validate a conversation and render it by the chat template, its last message left open where this server continues it."""
    warp, seed, stop = _common(body, engine, limits)
    if not body.messages:
        text = "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead."
        raise refusal(text, param="messages", code="empty_array")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise refusal("Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.")
    if body.top_logprobs is not None and not body.logprobs:
        raise refusal("The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.", param="top_logprobs")
    asked = body.top_logprobs or 0
    if asked > limits.max_top >= 0:
        text = f"Invalid 'top_logprobs': integer above maximum value. Expected a value <= {limits.max_top}, but got {asked} instead."
        raise refusal(text, param="top_logprobs", code="integer_above_max_value")
    opened = _left_open(body, limits)
    messages = [message.plain() for message in body.messages]
    how = {"continue_final_message": True} if opened else {"add_generation_prompt": body.add_generation_prompt is not False}
    ids = list(engine.tokenizer.apply_chat_template(messages, return_dict=True, **how)["input_ids"])
    longest = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    wanted = _room(len(ids), longest, limits, "messages")
    return Plan(ids, wanted, warp, seed, asked if body.logprobs and limits.logprobs else None, stop)


def _left_open(body: ChatRequest, limits: Limits) -> bool:
    """Whether the answer goes on from the last message; each kind of server has its own way of asking for that."""
    for name in ("continue_final_message", "add_generation_prompt"):
        if getattr(body, name) is not None and limits.prefill != "continue_final_message":
            raise refusal(f"Unrecognized request argument supplied: {name}")
    for at, message in enumerate(body.messages):
        if message.prefix is not None and limits.prefill != "prefix":
            path = f"messages[{at}].prefix"
            raise refusal(f"Unknown parameter: '{path}'.", param=path, code="unknown_parameter")
    last = body.messages[-1]
    asked = {"continue_final_message": body.continue_final_message, "prefix": last.prefix, "plain": True}.get(limits.prefill)
    if body.continue_final_message and body.add_generation_prompt is not False:
        raise refusal("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
    return bool(asked) and last.role == "assistant"


def check_completion(body: CompletionRequest, engine: Engine, limits: Limits) -> Plan:
    """Validate a prompt, given as text or as ids."""
    warp, seed, stop = _common(body, engine, limits)
    prompt = body.prompt
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise refusal("several prompts in a request are not emulated", param="prompt", code="unsupported_value")
        prompt = prompt[0]
    cap = COMPLETIONS_TOP if limits.max_top < 0 else min(COMPLETIONS_TOP, limits.max_top)
    if (body.logprobs or 0) > cap:
        raise refusal(f"{body.logprobs} is greater than the maximum of {cap} - 'logprobs'", param="logprobs")
    if body.echo and body.logprobs is not None:
        raise refusal("Setting 'echo' and 'logprobs' at the same time is not supported for this model.")
    if isinstance(prompt, str):
        ids = engine.tokenizer.encode(prompt)
    elif not limits.token_prompts:
        raise refusal("Invalid type for 'prompt': expected a string.", param="prompt", code="invalid_type")
    else:
        ids = [token for token in prompt if isinstance(token, int)]
        if ids and not 0 <= min(ids) <= max(ids) < engine.rows:
            raise refusal("Invalid 'prompt': a token id is out of range.", param="prompt", code="invalid_value")
    if not ids:
        raise refusal("Invalid 'prompt': it is empty.", param="prompt", code="invalid_value")
    wanted = _room(len(ids), DEFAULT_COMPLETION if body.max_tokens is None else body.max_tokens, limits, "prompt")
    before = prompt if isinstance(prompt, str) else engine.tokenizer.decode(ids)
    return Plan(ids, wanted, warp, seed, body.logprobs if limits.logprobs else None, stop, before, bool(body.echo))
