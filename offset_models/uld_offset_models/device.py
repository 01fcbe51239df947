"""Where training runs and in which precision."""

import os

import torch

from uld_adapters.errors import UsageError


def choose_device(wanted: str) -> str:
    """`auto` is the process's GPU when there is one; several GPUs are several processes, started by `accelerate launch`."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted != "cpu" and not wanted.startswith("cuda"):
        raise UsageError(f"unknown device {wanted!r}", hint="use --device auto, cpu or cuda")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("no CUDA device was found", hint="use --device cpu, or install a CUDA build of torch")
    if wanted == "cuda":  # not accelerate's state: that keeps the device of an earlier training in this process, a CPU perhaps
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % max(1, torch.cuda.device_count())}"
    return wanted


def choose_dtype(wanted: str, device: str) -> torch.dtype:
    """`auto` is bfloat16 where the processor computes in it (GPU; CPU with avx512_bf16 or amx), else float32. The base's dtype only."""
    if wanted == "auto":
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if device != "cpu" else _cpu_has_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]


def _cpu_has_bfloat16() -> bool:
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)
