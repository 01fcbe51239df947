"""Delta-unlearning: the demo's pairs, plain and gated, beside ULD."""

import shutil
from pathlib import Path
from typing import Any

from demo_rows import say

from uld_sdk.demo import pairs


def measure(work: Path) -> dict[str, Any]:
    """What `uld-sdk demo --method offset` compares; what the server says of the rows is cached once."""
    shutil.rmtree(work / "offset" / "cache", ignore_errors=True)  # what is timed is not to be there already
    report = pairs.run_pairs(
        output=work / "offset", top_logprobs=20, max_seconds=None, steps=None, open_report=False, data=None, small=False,
        on_line=say,
    )  # fmt: skip
    return {"compared": report["compared"]}
