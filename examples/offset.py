"""Delta-unlearning from Python: ask a vLLM server once what it says of the texts, train a pair against that, and answer through it.

python examples/offset.py --base MODEL --base-url URL --forget forget.jsonl --retain retain.jsonl --output PAIR
"""

import argparse
from pathlib import Path

from uld_sdk import UnlearnedClient, cache, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True, help="folder, hub name or GGUF file of the small model, of the server's tokenizer")
    parser.add_argument("--base-url", required=True, help="address of a vLLM server")
    parser.add_argument("--forget", required=True, help="JSONL, CSV or Parquet with question and answer")
    parser.add_argument("--retain", required=True, help="the same for what must stay")
    parser.add_argument("--output", required=True, help="folder to make; the cache is made beside it")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--ask", default="Who opens the shop?")
    arguments = parser.parse_args()

    data = {"forget": arguments.forget, "retain": arguments.retain, "base": arguments.base}
    asked = cache(output=Path(arguments.output).with_suffix(".cache"), backend="vllm", base_url=arguments.base_url, **data)
    print(f"{asked.texts} texts, {asked.requests} requests, {asked.bytes} bytes")

    pair = train(
        method="offset", objective="npo+kl", cache=asked.path, output=arguments.output, steps=arguments.steps, progress=False, **data
    )
    print(f"{pair.path}: {pair.seconds:.1f} s, {pair.manifest.steps} steps")

    with UnlearnedClient(backend="vllm", base_url=arguments.base_url, assistant=pair.path) as client:
        result = client.generate(arguments.ask, max_new_tokens=16)
    report = result.report
    print(
        f"{report.changed} of {report.positions} tokens changed, {report.exact} positions exact, {report.completed} with a completed tail"
    )


if __name__ == "__main__":
    main()
