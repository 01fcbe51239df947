"""A third party's package, really installed by pip, adds a backend that the client uses by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parent / "plugin_backend"
PROGRAM = """
import json, sys
from uld_adapters.registry import backend_names
from uld_sdk import UnknownName, UnlearnedClient

with UnlearnedClient(backend="parrot", model="The parrot says hello.", tokenizer=sys.argv[1]) as client:
    result = client.generate("What is the name of the river?")
    score = client.score("What is the name of the river?", "The parrot")
try:
    UnlearnedClient(backend="parot", tokenizer=sys.argv[1])
except UnknownName as error:
    hint = error.hint
print(json.dumps({"names": backend_names(), "text": result.text, "untouched": result.untouched, "hint": hint, "logprob": score.logprob}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("third-party")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    done = subprocess.run([*pip, str(PLUGIN)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return target


def test_an_installed_package_adds_a_backend(installed: Path, tiny_target: Path) -> None:
    path = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tiny_target)], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["names"] == ["hf", "llamacpp", "openai", "parrot", "tgi", "vllm"]
    assert told["text"] == "The parrot says hello."
    assert told["untouched"] is True
    assert told["hint"] == "did you mean 'parrot'?"
    assert told["logprob"] < 0.0


def test_without_the_package_the_name_is_unknown() -> None:
    from uld_adapters.errors import UnknownName
    from uld_adapters.registry import create_backend

    with pytest.raises(UnknownName, match="known: hf, llamacpp, openai, tgi, vllm"):
        create_backend("parrot")
