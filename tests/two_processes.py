"""What each of two training processes does: scenarios in a row, their outcomes as one JSON file a rank.

    RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python two_processes.py OPTIONS.json FOLDER

The environment is the one that torchrun and `accelerate launch` set.
"""

import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

RANK = int(os.environ["RANK"])


def scenarios(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    import safetensors.torch
    import torch
    from typer.testing import CliRunner

    from uld_adapters.errors import UldError
    from uld_offset_models import run
    from uld_offset_models.network import Assistant, Losses
    from uld_sdk.cli import app
    from uld_sdk.training import train

    def trained(name: str, **more: Any) -> dict[str, Any]:
        try:
            result = train(**{**options, "output": folder / name, **more})
        except UldError as error:
            return {"error": type(error).__name__, "message": error.message, "code": error.exit_code}
        except RuntimeError as error:
            return {"error": type(error).__name__, "message": str(error)}
        return {"history": result.history, "steps": result.manifest.steps, "losses": result.manifest.losses}

    def faulty(entry: dict[str, float]) -> None:
        raise RuntimeError("a display that fails")

    outcomes = {"plain": trained("plain")}
    outcomes["pair"] = trained("pair", method="offset", target=options["base"], gate=True, margin=50.0)

    class Fast:
        """A clock by which a thousand seconds go by at each look."""

        now = 0.0

        def perf_counter(self) -> float:
            self.now += 1000.0
            return self.now

    for name, rank in (("fast_follower", 1), ("fast_leader", 0)):
        run.time = Fast() if rank == RANK else time  # type: ignore[assignment]
        outcomes[name] = trained(name, max_seconds=500.0)
    run.time = time

    after_step = run.Run.after_step

    def pressed(self: Any, *given: Any) -> bool:
        if RANK == 1 and given[0] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return after_step(self, *given)

    run.Run.after_step = pressed  # type: ignore[method-assign]
    outcomes["interrupted"] = trained("interrupted")
    run.Run.after_step = after_step  # type: ignore[method-assign]
    outcomes["resumed"] = trained("interrupted", resume=True)

    forward = Assistant.forward

    def broken(self: Any, step: Any) -> Losses:
        losses = forward(self, step)
        return Losses(losses.remember * float("nan"), losses.uniform) if RANK == 1 else losses

    Assistant.forward = broken  # type: ignore[method-assign]
    outcomes["diverged"] = trained("diverged")
    Assistant.forward = forward  # type: ignore[method-assign]

    outcomes["display"] = trained("display", on_progress=faulty)

    save = safetensors.torch.save_file

    def full(*given: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    if RANK == 0:
        safetensors.torch.save_file = full
    outcomes["full"] = trained("full", checkpoint_every=100)
    safetensors.torch.save_file = save

    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if name != "progress"]
    said = CliRunner().invoke(app, ["train", *flags, "--no-progress", "--json", f"--output={folder / 'cli'}"])
    outcomes["cli"] = {"code": said.exit_code, "stdout": said.stdout, "stderr": said.stderr}
    torch.distributed.destroy_process_group()
    return outcomes


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100, exit=True)  # where it hangs, if it does
    place = Path(sys.argv[2])
    result = scenarios(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), place)
    (place / f"rank{RANK}.json").write_text(json.dumps(result), encoding="utf-8")
