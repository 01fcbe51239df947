"""The command line: help pages, what goes to which stream, exit codes, and each command against a running server."""

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import uld_sdk
from uld_sdk.cli import COMMANDS, app
from uld_sdk.cli.options import ClientOptions, SamplingOptions, ServerOptions
from uld_sdk.cli.train import TrainingOptions

QUESTION = "Who opens the shop?"
Run = Callable[..., Any]


@pytest.fixture
def run() -> Run:
    """Runs a command in this process; the outcome has exit_code, stdout and stderr apart."""

    def invoke(*arguments: object, input: str | None = None) -> Any:
        outcome = CliRunner().invoke(app, [str(argument) for argument in arguments], input=input, prog_name="uld-sdk")
        assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exception
        assert "Traceback" not in outcome.stderr
        return outcome

    return invoke


@pytest.fixture
def tgi(tgi_server: Any, tiny_artifact: Path) -> list[object]:
    """The options of a client for the TGI emulator."""
    return ["-b", "tgi", "-u", tgi_server.url, "-a", tiny_artifact, "-n", 12]


def test_help_lists_every_command(run: Run) -> None:
    page = run("--help")
    assert page.exit_code == 0
    for name in ("augment", "cache", "train", "calibrate", "generate", "chat", "inspect", "align", "emulate", "demo"):
        assert f" {name} " in page.stdout


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_a_help_page_that_describes_its_options(run: Run, command: str) -> None:
    page = run(command, "--help")
    assert page.exit_code == 0
    assert "Usage: uld-sdk " + command in page.stdout
    for parameter in inspect.signature(COMMANDS[command]).parameters.values():
        settings = parameter.annotation.__metadata__[0]
        assert settings.help, f"{command}: {parameter.name} has no help"
        for flag in (settings.default, *(settings.param_decls or ())):  # typer keeps the first one apart
            assert not isinstance(flag, str) or flag.split("/")[0] in page.stdout, f"{command}: {flag}"
    assert "--json" in page.stdout


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", "What is not given comes from the recipe, then from the preset."),
        ("train", "Largest norm of the gradient; 0 turns it off."),
        ("augment", "neighbours are then about words and figures only."),
    ],
)
def test_help_says_what_a_flag_does_not_show(run: Run, command: str, words: str) -> None:
    page = run(command, "--help").stdout.replace("│", " ")
    assert words in " ".join(page.split())


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"uld-sdk {uld_sdk.__version__}\n"


def test_the_flags_are_the_arguments_of_the_python_interface() -> None:
    from uld_sdk.async_client import AsyncUnlearnedClient

    client = inspect.signature(AsyncUnlearnedClient).parameters.keys() - {"http_client", "trace"}
    assert {field.name for field in dataclasses.fields(ClientOptions)} == client
    server = {field.name for field in dataclasses.fields(ServerOptions)}
    for call in (uld_sdk.cache, uld_sdk.augment):
        assert server <= inspect.signature(call).parameters.keys()
    training = inspect.signature(uld_sdk.train).parameters.keys() - {"recipe", "on_progress"}
    assert {field.name for field in dataclasses.fields(TrainingOptions)} == training
    answering = inspect.signature(AsyncUnlearnedClient.generate).parameters.keys() - {"self", "prompt", "raw"}
    assert {field.name for field in dataclasses.fields(SamplingOptions)} == answering


def test_generate_writes_the_answer_to_stdout_and_the_report_to_stderr(run: Run, tgi: list[object]) -> None:
    told = run("generate", QUESTION, *tgi)
    assert told.exit_code == 0, told.stderr
    document = json.loads(run("generate", QUESTION, *tgi, "--json").stdout)
    assert told.stdout == document["text"] + "\n"
    assert "untouched positions" in told.stderr
    assert document["prompt"] == QUESTION
    assert document["report"]["requests"] >= 1
    assert document["usage"]["completion_tokens"] == len(document["token_ids"])


def test_generate_reads_the_prompt_from_stdin(run: Run, tgi: list[object]) -> None:
    assert run("generate", "-", *tgi, input=QUESTION).stdout == run("generate", QUESTION, *tgi).stdout


def test_generate_answers_many_prompts_in_their_order(run: Run, tgi: list[object], tmp_path: Path) -> None:
    rows = [QUESTION, {"prompt": "Who wrote the book?"}, {"messages": [{"role": "user", "content": QUESTION}]}, {"question": QUESTION}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    told = run("generate", "--input", file, *tgi, "-c", 3, "--json")
    assert told.exit_code == 0, told.stderr
    results = json.loads(told.stdout)["results"]
    assert [result["prompt"] for result in results[:2]] == [QUESTION, "Who wrote the book?"]
    single = json.loads(run("generate", QUESTION, *tgi, "--json").stdout)
    assert [result["text"] == single["text"] for result in results] == [True, results[1]["text"] == single["text"], True, True]
    shown = run("generate", "--input", file, *tgi)
    assert "Who wrote the book?" in shown.stdout


def test_generate_shows_each_token_with_trace(run: Run, tgi: list[object]) -> None:
    told = run("generate", QUESTION, *tgi, "--trace", "--json")
    document = json.loads(told.stdout)
    assert len(document["report"]["trace"]) == len(document["token_ids"])
    assert "token by token" in run("generate", QUESTION, *tgi, "--trace").stderr


def test_sampling_flags_reach_the_client(run: Run, tgi: list[object]) -> None:
    drawn = [json.loads(run("generate", QUESTION, *tgi, "-t", 0.9, "--seed", seed, "--json").stdout) for seed in (1, 1, 2)]
    assert drawn[0]["text"] == drawn[1]["text"]
    assert drawn[0]["report"]["mode"] == "match"
    assert len({answer["text"] for answer in drawn}) == 2


def test_a_refusal_is_not_preceded_by_what_it_takes_back(run: Run, tgi: list[object]) -> None:
    told = run("generate", "Who counts the apples?", *tgi, "--on-touched", "refuse", "--refusal", "No.", "--margin", 0, "--alpha", 50)
    assert told.exit_code == 0, told.stderr
    assert told.stdout == "No.\n"


def test_without_an_assistant_it_says_so(run: Run, tgi_server: Any, tiny_target: Path) -> None:
    told = run("generate", QUESTION, "-b", "tgi", "-u", tgi_server.url, "--tokenizer", tiny_target, "-n", 8)
    assert told.exit_code == 0, told.stderr
    assert "no --assistant" in told.stderr


def test_chat_keeps_the_conversation_until_reset(run: Run, tgi: list[object]) -> None:
    told = run("chat", *tgi, input=f"{QUESTION}\nWho wrote the book?\n/reset\n{QUESTION}\n/exit\nnever asked\n")
    assert told.exit_code == 0, told.stderr
    single = run("generate", QUESTION, *tgi).stdout
    assert told.stdout.startswith(single)
    assert told.stdout.endswith(single)
    assert told.stderr.count("requests, ") == 3


def test_chat_prints_the_conversation_as_json(run: Run, tgi: list[object]) -> None:
    told = run("chat", *tgi, "--json", "--system", "Be brief.", input=f"{QUESTION}\n/help\n")
    document = json.loads(told.stdout)
    assert [message["role"] for message in document["messages"]] == ["system", "user", "assistant"]
    assert document["messages"][-1]["content"] == document["results"][0]["text"]
    assert "/exit" in told.stderr


@pytest.mark.parametrize(("backend", "server"), [("tgi", "tgi_server"), ("vllm", "vllm_server"), ("llamacpp", "llamacpp_server")])
def test_inspect_shows_what_the_server_can_do(
    run: Run, request: pytest.FixtureRequest, tiny_artifact: Path, backend: str, server: str
) -> None:
    url = request.getfixturevalue(server).url
    told = run("inspect", "-b", backend, "-u", url, "-a", tiny_artifact, "--json")
    assert told.exit_code == 0, told.stderr
    document = json.loads(told.stdout)
    assert document["fits"] is True
    assert document["server"]["top_logprobs"] == 20
    assert document["server"]["ids_in"] is (backend != "tgi")
    assert document["assistant"]["method"] == "uld"
    shown = run("inspect", "-b", backend, "-u", url, "-a", tiny_artifact)
    assert "the assistant fits the server" in shown.stdout
    assert "log-probabilities a token" in shown.stdout


def test_a_cap_below_the_default_is_told_by_inspect_and_the_report(run: Run, tiny_target: Path, tiny_artifact: Path) -> None:
    """A cap that nobody asked to exceed is no warning: TGI's own default is 5."""
    from uld_adapters.emulator import EmulatorServer, build_app

    with EmulatorServer(build_app(tiny_target, dialect="tgi")) as server:
        reach = ["-b", "tgi", "-u", server.url, "-a", tiny_artifact]
        document = json.loads(run("inspect", *reach, "--json").stdout)
        told = run("generate", QUESTION, *reach, "-n", 2)
        answer = json.loads(run("generate", QUESTION, *reach, "-n", 2, "--json").stdout)
    assert (document["server"]["top_logprobs"], document["server"]["top_logprobs_cap"]) == (5, 5)
    assert answer["report"]["top_logprobs"] == 5
    assert "log-probabilities a token" in told.stderr
    assert "warning" not in told.stderr


def test_a_local_target_may_be_placed(run: Run, tiny_target: Path, tiny_artifact: Path) -> None:
    local = ["-b", "hf", "-m", tiny_target, "-a", tiny_artifact, "-n", 2, "--json"]
    told = run("generate", QUESTION, *local, "--target-device", "cpu", "--target-dtype", "bfloat16", "--top-logprobs", 100000)
    assert told.exit_code == 0, told.stderr
    assert json.loads(told.stdout)["report"]["top_logprobs"] is None


def test_flags_beat_the_recipe_in_steps_and_epochs(run: Run, tiny_target: Path, tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    written = {"base": tiny_target, "forget": tiny_data[0], "retain": tiny_data[1], "steps": 50, "batch_size": 2, "dtype": "float32"}
    recipe.write_text("".join(f"{name}: {value}\n" for name, value in written.items()), encoding="utf-8")
    told = run("train", "-r", recipe, "-o", tmp_path / "out", "--epochs", 1.5, "--no-progress", "--json")
    assert told.exit_code == 0, told.stderr
    assert json.loads(told.stdout)["manifest"]["steps"] == 3, "four rows, two a step, one epoch and a half"


def test_prompts_may_hold_any_separator_that_json_allows(run: Run, tgi: list[object], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes('\ufeff"Who opens\u2028the shop?"\r\n"Who wrote the book?"\r\n'.encode())
    told = run("generate", "--input", file, *tgi, "--json")
    assert told.exit_code == 0, told.stderr
    assert [result["prompt"] for result in json.loads(told.stdout)["results"]] == ["Who opens\u2028the shop?", "Who wrote the book?"]


def test_inspect_an_artifact_alone(run: Run, tiny_artifact: Path) -> None:
    told = run("inspect", "-a", tiny_artifact)
    assert told.exit_code == 0, told.stderr
    assert "complete" in told.stdout


def test_inspect_a_server_alone(run: Run, vllm_server: Any, tiny_target: Path) -> None:
    document = json.loads(run("inspect", "-b", "vllm", "-u", vllm_server.url, "--tokenizer", tiny_target, "--json").stdout)
    assert document["server"]["context"] == 512
    assert "fits" not in document


def test_train_takes_a_recipe_and_flags_win(run: Run, tiny_target: Path, tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    written = {"base": tiny_target, "forget": tiny_data[0], "retain": tiny_data[1], "steps": 50, "rank": 4, "dtype": "float32"}
    recipe.write_text("".join(f"{name}: {value}\n" for name, value in written.items()), encoding="utf-8")
    told = run("train", "--recipe", recipe, "-o", tmp_path / "out", "--steps", 3, "--no-progress", "--json")
    assert told.exit_code == 0, told.stderr
    document = json.loads(told.stdout)
    assert Path(document["path"]) == tmp_path / "out"
    assert document["manifest"]["steps"] == 3
    assert document["manifest"]["training"]["rank"] == 4
    again = run("train", "--recipe", recipe, "-o", tmp_path / "out", "--steps", 3)
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
    shown = run("train", "--recipe", recipe, "-o", tmp_path / "out", "--steps", 3, "--overwrite")
    assert shown.exit_code == 0, shown.stderr
    assert "uniform loss" in shown.stdout
