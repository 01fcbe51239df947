"""The package as a whole: its public names, what importing it costs, its recipes, and the size of its modules."""

import importlib
import json
import resource
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

import uld_sdk

ROOT = Path(__file__).parent.parent
PACKAGES = [ROOT / "sdk" / "uld_sdk", ROOT / "adapters" / "uld_adapters", ROOT / "offset_models" / "uld_offset_models"]
MODULES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
RECIPES = sorted((ROOT / "offset_models" / "uld_offset_models" / "recipes").glob("*.yaml"))
HEAVY = ("torch", "numpy", "transformers", "peft", "httpx2", "pydantic", "datasets", "matplotlib", "starlette")


def python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(uld_sdk.__all__) == uld_sdk.__all__
    for name in uld_sdk.__all__:
        value = getattr(uld_sdk, name)
        assert name == "__version__" or value.__doc__
    assert set(uld_sdk.__all__) <= set(dir(uld_sdk))


def test_the_public_names_are_these() -> None:
    classes = {name for name in uld_sdk.__all__ if isinstance(getattr(uld_sdk, name), type)}
    errors = {name for name in classes if issubclass(getattr(uld_sdk, name), Exception)}
    assert set(uld_sdk.__all__) - errors == {
        "AsyncUnlearnedClient",
        "AugmentResult",
        "CacheResult",
        "CalibrationResult",
        "Cost",
        "Piece",
        "Report",
        "Result",
        "ScoreResult",
        "Step",
        "TrainResult",
        "UnlearnedClient",
        "__version__",
        "augment",
        "cache",
        "calibrate",
        "train",
    }
    from uld_adapters import errors as tree

    raised = {name for name, value in vars(tree).items() if isinstance(value, type) and issubclass(value, tree.UldError)}
    assert errors == raised


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = uld_sdk.Nothing


def test_importing_it_loads_nothing_heavy() -> None:
    loaded = json.loads(python("import json, sys, uld_sdk, uld_sdk.cli; print(json.dumps(sorted(sys.modules)))"))
    assert not set(HEAVY) & set(loaded)


@pytest.mark.parametrize(("command", "limit"), [(["-c", "import uld_sdk"], 1.0), (["-m", "uld_sdk.cli", "--help"], 2.0)])
def test_starting_is_quick(command: list[str], limit: float) -> None:
    """Processor time above that of a bare interpreter, in units of what any help page costs: some .14 s, on a busy machine more."""
    measured = {"bare": ["-c", "pass"], "unit": ["-c", "import typer.rich_utils"], "ours": command}
    spent: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(9):  # in turns, so that a machine which slows down slows all of them
        for name, arguments in measured.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True, timeout=60)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    bare, unit, ours = map(min, spent.values())
    assert ours - bare < limit * (unit - bare)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_complete_and_valid(path: Path) -> None:
    from uld_offset_models.recipes import PRESETS, Recipe, resolve

    recipe = resolve(recipe=path)
    assert recipe.preset == path.stem
    assert path.stem in PRESETS
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == set(Recipe.model_fields)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_one_idea(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    assert path.stem not in ("utils", "util", "helpers", "common", "misc", "core")
    assert text.startswith('"""'), "a module begins by saying what it is"


def test_every_module_imports() -> None:
    for path in MODULES:
        relative = path.relative_to(path.parents[len(path.relative_to(ROOT).parts) - 2]).with_suffix("")
        name = ".".join(relative.parts)
        if not name.endswith("__main__"):
            importlib.import_module(name.removesuffix(".__init__"))


def test_no_dependency_is_undeclared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = {line.split(">")[0] for line in project["dependencies"]}
    assert {"httpx2", "tenacity", "pydantic", "numpy", "torch", "transformers", "peft"} <= core
    assert "httpx" not in core
    assert set(project["optional-dependencies"]) >= {"train", "hf", "serve", "report", "demo", "dev", "all"}
    assert project["version"] == uld_sdk.__version__


def test_ctrl_c_ends_with_130_and_a_word(tmp_path: Path) -> None:
    """A server that accepts and never answers: the client waits until it is interrupted."""
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        command = ["generate", "hi", "-b", "vllm", "-u", f"http://127.0.0.1:{silent.getsockname()[1]}", "--tokenizer", str(tmp_path)]
        program = [sys.executable, "-m", "uld_sdk.cli", *command]
        process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        connection, _ = silent.accept()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        connection.close()
    assert process.returncode == 130
    assert out == ""
    assert "interrupted" in err
    assert "Traceback" not in err


def test_the_wheel_holds_code_types_and_data(tmp_path: Path) -> None:
    import zipfile

    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in PACKAGES:
        ours = {path for path in package.rglob("*") if path.suffix in {".py", ".yaml", ".jsonl", ".html", ".typed"}}
        assert {str(path.relative_to(package.parent)) for path in ours} <= names
    assert not any(name.split("/")[0] in {"tests", "examples", "benchmarks"} for name in names)
