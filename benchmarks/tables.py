"""benchmarks/README.md, made from the JSON files of the parts that have been run."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MOST_ADDED = 12  # tokens of the small model a position
HEAD = """# Benchmarks

Made by `make bench` (`python benchmarks/run.py`); one part alone: `python benchmarks/run.py demo`, or latency, offset, gradients,
steps, artifacts, training, startup, vocabulary, retokenised.
Ratios compare runs that took turns on the same machine in one process; seconds are of the machine named above each table. Do not
edit this file by hand: it is made from the JSON files beside it.
"""


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    names = list(head)
    lines = [names, ["---"] * len(names), *[[str(cell) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def source(figures: dict[str, Any]) -> str:
    """Where a part's figures come from; a script run by itself leaves only its figures."""
    if "command" not in figures:
        return "Made by the part's own script.\n"
    return f"`{figures['command']}`, {figures['date']}, {figures['machine']}, {figures['seconds']:.0f} s.\n"


def demo(figures: dict[str, Any]) -> str:
    """One column a variant, one row a figure, the targets of `gated` with top 20 beside them."""
    variants = figures["variants"]
    wanted: list[tuple[str, str, Any]] = [
        ("forget ROUGE-L, held out", "at most .30", lambda v: f"{v['forget_rouge']['holdout']:.3f}"),
        ("forget ROUGE-L, trained", "", lambda v: f"{v['forget_rouge']['train']:.3f}"),
        ("forget answers unchanged, held out", "0", lambda v: v["forget_unchanged"]["holdout"]),
        ("retain ROUGE-L, held out", "at least .95", lambda v: f"{v['retain_rouge']['holdout']:.3f}"),
        ("retain ROUGE-L, trained", "", lambda v: f"{v['retain_rouge']['train']:.3f}"),
        ("retain identical, held out", "at least 90%", lambda v: f"{v['retain_identical']:.1%}"),
        ("retain untouched, held out", "at least 80%", lambda v: f"{v['retain_untouched']:.1%}"),
        ("near neighbours identical", "", lambda v: f"{v['retain_identical_neighbours']:.1%}"),
        ("looping answers before, after", "one more", lambda v: f"{v['loops_before']}, {v['loops_after']}"),
        ("requests an answer, retain", "at most 1.1", lambda v: v["requests_per_answer"]["retain"]),
        ("requests an answer, forget", "", lambda v: v["requests_per_answer"]["forget"]),
        ("wall clock, retain (llama.cpp)", "", lambda v: v["wall_ratio"]),
        ("requests an answer, retain, sampled", "at most 1.1", lambda v: v["sampled"]["requests_per_answer"]),
        ("training seconds, steps", "at most 120", lambda v: f"{v['training_seconds']:.0f}, {v['training_steps']}"),
        ("alpha, margin", "", lambda v: f"{v['settings']['alpha']}, {v['settings']['margin']}"),
    ]
    rows = [[name, goal, *[value(variant) for variant in variants.values()]] for name, goal, value in wanted]
    text = "Presets `paper` and `release` were given the training seconds of `gated`; they have no margin.\n"
    return f"## The demo's figures\n\n{source(figures)}\n{text}\n" + table(["", "target", *variants], rows)


def latency(figures: dict[str, Any]) -> str:
    """One row a dialect and kind of prompt."""
    rows = []
    for name, found in figures.items():
        if not isinstance(found, dict):
            continue
        goal = "wall 2.0" if "forget" in name else "wall 1.05, first 1.1 and one pass, requests 1.1"
        faster = found.get("times_faster_than_one_request_a_token", "")
        ratios = [found["wall_ratio"], found["wall_ratio_untouched"] or "", found["first_token_ratio"], found["requests_per_answer"]]
        rows.append([name, goal, *ratios, faster, f"{found['answers']}, {found['answers_untouched']}"])
    text = (
        f"Emulated server in its own process, round trip {figures['round_trip_seconds'] * 1000:.0f} ms, "
        f"{figures['seconds_per_token'] * 1000:.0f} ms a token, {figures['new_tokens']} tokens an answer, top 20; ratios against the "
        f"plain stream of the same server. {figures['small_model_prompt_pass_seconds'] * 1000:.0f} ms for the small model's prompt. "
        "Target: at least 5 times faster than one request a token, of which 20 ms and 20 ms leave 2. A sampled answer "
        "that is rewritten leaves the text that the emulator has in its memo, and waits for the model itself on the same two cores.\n"
    )
    head = ["prompts", "at most", "wall clock ratio", "of untouched answers", "first token ratio", "requests an answer"]
    head += ["times one request a token", "answers, untouched"]
    return f"## Latency\n\n{source(figures)}\n{text}\n" + table(head, rows)


def artifacts(figures: dict[str, Any]) -> str:
    """A row for each thing that is read, and for each kind of prompt through the client."""
    rows = []
    for name, found in figures["reading"].items():
        milliseconds = [f"{1000 * found[one]:.1f}" for one in ("one_seconds", "together_seconds", "apart_seconds")]
        rows.append([name, "1.5" if "a token" in name else "", *milliseconds, found["together_ratio"], found["apart_ratio"]])
    wall = [[name, found["wall_ratio"], found["answers"]] for name, found in figures["client"].items()]
    text = (
        "Two assistants of one base (SmolLM2-135M, 6 layers, LoRA of rank 32) against one: together in one batch, and apart as two models "
        f"of their own. Median over {figures['answers']} answers that took turns; a token is one that is read as it streams in.\n"
    )
    through = (
        f"Through the client, emulated vLLM, round trip {figures['round_trip_seconds'] * 1000:.0f} ms, "
        f"{figures['seconds_per_token'] * 1000:.0f} ms a token: wall clock of two assistants against one.\n"
    )
    head = ["read", "at most", "one, ms", "together, ms", "apart, ms", "together to one", "apart to one"]
    return f"## Several artifacts\n\n{source(figures)}\n{text}\n{table(head, rows)}\n{through}\n" + table(
        ["answers", "wall clock a token, two to one", "number"], wall
    )


def training(figures: dict[str, Any]) -> str:
    """Whatever the comparison measured, name by name."""
    skip = ("command", "date", "machine", "seconds")
    rows = [[key.replace("_", " "), value] for key, value in figures.items() if key not in skip and not isinstance(value, list | dict)]
    return f"## Training speed\n\n{source(figures)}\nTargets: at least twice as fast, same losses to 1e-3.\n\n" + table(["", "value"], rows)


def offset(figures: dict[str, Any]) -> str:
    """The pairs beside ULD."""
    from uld_sdk.demo.pairs import COLUMNS

    lines = [[line["variant"], *(form.format(line[name]) for name, (_, form) in COLUMNS.items())] for line in figures["compared"]]
    return (
        f"## Delta-unlearning\n\n{source(figures)}\nnpo+kl on SmolLM2-135M behind llama.cpp, top 20. Targets: a pair forgets (ROUGE-L at "
        "most .60); a gated one forgets no less and keeps at least 90% of the retain answers identical. Loading includes what o says "
        "of the rows; the second pair finds it beside the cache.\n\n"
    ) + table(["held-out questions", *(head for head, _ in COLUMNS.values())], lines)


def gradients(figures: dict[str, Any]) -> str:
    """Errors of gradients by k."""
    objectives = list(figures["gradients"][0]["errors"])
    errors = []
    for entry in figures["gradients"]:
        layers = "all, the target itself" if entry["layers"] is None else f"{entry['layers']}"
        errors.append([layers, entry["k"], entry["tail"], *(f"{entry['errors'][name]:.1%}" for name in objectives)])
    return (
        f"## Gradients from a top-k report\n\n{source(figures)}\nAgainst those from complete distributions: relative norm of the "
        "difference, median over 3 batches of 2 forget and 2 retain rows, after 4 steps. Target: at most 10% from a completed top 20.\n\n"
    ) + table(["layers of the small model", "k", "tail", *objectives], errors)


def steps(figures: dict[str, Any]) -> str:
    """A training step of each method."""
    uld = figures["steps"][0]
    rows = [[s["method"], s["seconds"], s["peak_mib"], s["gflops"], f"{s['seconds'] / uld['seconds']:.2f}"] for s in figures["steps"]]
    return (
        f"## A training step\n\n{source(figures)}\nOne step of 8 forget and 8 retain rows: ULD's assistant of 6 layers, npo+kl in the "
        "target's own LoRA (direct), npo+kl in a pair of whole models (offset), whose constants are cached. The paper claims that "
        "ULD is more than three times faster than baselines.\n\n"
    ) + table(["method", "seconds a step", "peak MiB", "GFLOPs a step", "seconds against ULD"], rows)


def startup(figures: dict[str, Any]) -> str:
    """Median seconds and ratios to a bare interpreter."""
    goals = {"import uld_sdk": "0.15 s", "uld-sdk --help": "0.3 s"}
    ratios = figures["ratio_to_python"]
    rows = [[f"`{name}`", goals.get(name, ""), f"{value:.3f} s", ratios[name]] for name, value in figures["median_seconds"].items()]
    heavy = ", ".join(figures["heavy_modules_loaded_by_import"]) or "none"
    return f"## Start\n\n{source(figures)}\ntorch, transformers, numpy and httpx2 loaded by the import: {heavy}.\n\n" + table(
        ["command", "at most", "median", "ratio"], rows
    )


def vocabulary(figures: dict[str, Any]) -> str:
    """The schemes against the exact distribution, then one row a pair and kind of text."""
    ours = {"bridge, one look-ahead": ".003, .000"}
    ours |= dict.fromkeys(("bridge, as the client reads", "bridge", "the plan's tree"), ".006, .004")
    goals = ours | {"single path": ".053, .080", "byte-prefix mass": ".089, .113", "first piece": ".103, .180", "no shift": ".265, .270"}
    toys = figures["total_variation"]
    order = sorted(toys["trained"]["schemes"].items(), key=lambda item: float(item[1]["aligned"][0]))
    schemes = [
        [name, goals.get(name, ""), *(f"{v:.4f} ± {e:.4f}" for kind in toys.values() for v, e in kind["schemes"][name].values())]
        for name, _ in order
    ]
    counts = [["prefixes", "", *(count for kind in toys.values() for count in kind["prefixes"].values())]]
    for name in toys["trained"]["rows"]:
        counts.append([f"rows, {name}", "", *(mean for kind in toys.values() for mean in kind["rows"][name].values())])
    keys = ("cover", "added_nodes", "added_nodes_95", "untouched_milliseconds", "milliseconds", "ahead_added_nodes", "ahead_milliseconds")
    pairs = [[name, *(v[key] for key in (*keys, "seconds_to_make"))] for name, v in figures["pairs"].items()]

    def told(key: str) -> str:
        """The largest mean of a figure over both texts of a pair, and the pair."""
        both: dict[str, list[tuple[float, int]]] = {}
        for name, v in figures["pairs"].items():
            both.setdefault(name.partition(",")[0], []).append((v[key], v["positions"]))
        means = {name: sum(n * count for n, count in each) / sum(count for _, count in each) for name, each in both.items()}
        most = max(means, key=means.__getitem__, default="no pair")
        return f"{means.get(most, 0):.1f} ({most})"

    above = [
        f"{name} ({kind}, {where})"
        for name, goals_ in ours.items()
        for kind, toy in toys.items()
        for (where, (value, _)), goal in zip(toy["schemes"][name].items(), goals_.split(", "), strict=True)
        if round(value, 3) > float(goal)
    ]  # fmt: skip
    many = [
        f"{name} ({v['added_nodes']:.1f}, with look-ahead {v['ahead_added_nodes']:.1f})"
        for name, v in figures["pairs"].items()
        if v["ahead_added_nodes"] > MOST_ADDED
    ]
    medians = [(run, name) for name, v in figures["pairs"].items() for run in v["ahead_milliseconds_of_runs"]]
    slowest, slow = max(medians, default=(0, "no pair"))
    text = (
        "Mean total variation from the exact distribution, which is a sum over all texts of random models on toy vocabularies, with its "
        "standard error. Targets: no worse than the plan's figures for the bridge, and better than all other schemes. The plan does not "
        "say how its toys were made. `trained`: byte pairs trained on two samples of one random language; there most other schemes are "
        "about as far off as in the plan. `random`: byte pairs put together at random, some of which stand for whole words only. Rows are "
        "those of the small model that are read at a prefix. The plan's tree has all spellings of how a candidate may begin. `bridge` "
        "leaves out those that lead to none, and reads on nowhere; the client has the bridge read on after likely candidates, with no more "
        f"rows than the plan's tree. Above the plan's figures are: {'; '.join(above) or 'none'}.\n"
    )
    more = (
        "Released tokenizers (large to small), top 20, models that count bigrams. Targets: at most 12 added tokens of the small model a "
        "position, and at most 1 ms beside the model, after warm-up. At untouched positions the client looks at no candidate; at touched "
        "ones it reads on after likely ones (look-ahead). Milliseconds are medians, of this process alone (CPU), of each position the "
        "least of three runs some minutes apart, each with a bridge made anew and warmed up on another text. Over both texts a pair "
        f"adds {told('added_nodes')} tokens or fewer, with look-ahead {told('ahead_added_nodes')}; texts with more than "
        f"{MOST_ADDED}: {', '.join(many) or 'none'}. A single run has a median of up to {slowest} ms with look-ahead ({slow}). "
        "Mistral v1 stands for Llama 2: both are SentencePiece BPE with bytes to fall back on.\n"
    )
    head = ["pair and text", "places", "added tokens", "at 95%", "ms untouched", "ms", "added with look-ahead", "ms with it", "s to make"]
    return (
        f"## Vocabularies\n\n{source(figures)}\n{text}\n"
        + table(["scheme", "in the plan", *(f"{kind}, {where}" for kind in toys for where in toys[kind]["prefixes"])], [*schemes, *counts])
        + f"\n{more}\n"
        + table(head, pairs)
    )


def retokenised(figures: dict[str, Any]) -> str:
    """One row a run and kind of question, one a comparison, and what the bridge makes of an assistant."""
    rows = [
        [name, kind, v["answers"], v["rouge"], ", ".join(map(str, v["by_seed"])), f"{v['identical']:.0%}", f"{v['untouched']:.0%}",
         v["alignment"], v["largest_bound"]]
        for name, run in figures["runs"].items()
        for kind, v in run.items()
    ]  # fmt: skip
    beside = [
        [f"{v['run']}, beside {v['beside']}", v["questions"], v["pairs"], *v["rouge"], f"{v['difference']:+} ± {v['standard_error']}"]
        for v in figures["compared"]
    ]
    said = [[name, *v.values()] for name, v in figures["said"].items()]
    learned = [[side, n, *v.values()] for side, trained in figures["losses"].items() for n, v in enumerate(trained)]
    text = (
        f"Held-out questions, {figures['new_tokens']} tokens an answer. `one tokenizer`: the demo's assistant, six layers of SmolLM2, "
        f"beside SmolLM2. `remote`: SmolLM2 made to speak the tokens of a BPE of {figures['vocabulary']}, trained on the demo's texts. "
        f"`small`: the same six layers with those tokens. `both`: that assistant beside that remote, the same tokens again "
        f"({figures['few']} questions a set). Target: ROUGE-L within 0.05 of the run with one tokenizer.\n\n"
        f"With few tokens ln |B| is small, and so is the largest shift of one token, alpha (ln |B| - tau): at {figures['alphas']['one']} "
        f"it is 5.9 nats with SmolLM2's tokens and 3.5 with those. Training gives the assistant with tokens of its own an alpha of "
        f"{figures['alphas']['own']:.3f}, where it is 5.9, too; once it ran at that of the other.\n"
    )
    head = ["run", "questions", "answers", "ROUGE-L", "by training", "identical", "untouched positions", "mode", "largest bound"]
    differences = ["runs", "questions", "pairs", "ROUGE-L", "beside", "difference, standard error"]
    sums = ["assistant of", "log p_a", "log s_a", "excess over tau, own tokens", "through the bridge"]
    losses = ["assistant", "seed", "remember, nats a token", "uniform", "retain hold-out untouched"]
    return (
        f"## Across tokenizers\n\n{source(figures)}\n{text}\n{table(head, rows)}\nPaired by question and training:\n\n"
        f"{table(differences, beside)}\nWhat an assistant with tokens of its own says of SmolLM2's own held-out forget answers, summed in "
        f"nats, in its tokens and through the bridge:\n\n{table(sums, said)}\nAt the end of training:\n\n{table(losses, learned)}"
    )


SECTIONS = {
    "demo": demo,
    "latency": latency,
    "offset": offset,
    "gradients": gradients,
    "steps": steps,
    "artifacts": artifacts,
    "training": training,
    "vocabulary": vocabulary,
    "retokenised": retokenised,
    "startup": startup,
}


def write(folder: Path) -> None:
    """README.md in the folder, with a section for each part found there."""
    sections = [HEAD]
    for name, section in SECTIONS.items():
        path = folder / f"{name}.json"
        if path.exists():
            sections.append(section(json.loads(path.read_text(encoding="utf-8"))))
    (folder / "README.md").write_text("\n".join(sections), encoding="utf-8")
