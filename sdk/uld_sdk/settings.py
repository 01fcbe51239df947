"""What one answer is asked for, after a client's options and a call's have been put together."""

from dataclasses import dataclass
from typing import Literal

from uld_offset_models.several import JointRule
from uld_offset_models.shift import Rule
from uld_sdk.sampling import Sampling
from uld_sdk.verify import Mode


@dataclass(frozen=True)
class Settings:
    """What one answer is asked for."""

    rule: Rule | JointRule
    sampling: Sampling
    mode: Mode
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    draft: str | int = "stream"
    on_touched: Literal["rewrite", "refuse"] = "rewrite"
    refusal: str = ""
    max_retries: int = 4
    trace: bool = False
    assistants: tuple[str, ...] = ("assistant",)  # as the rule has them
    alignment: str = "identity"
