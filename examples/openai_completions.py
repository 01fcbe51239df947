"""The completions route of a server of the OpenAI kind: plain text gone on with, and a given text scored.

python examples/openai_completions.py --base-url http://localhost:8000/v1 --assistant ASSISTANT "The beginning of a text"
"""

import argparse

from uld_sdk import UnlearnedClient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", required=True, help="address of the server")
    parser.add_argument("--assistant", required=True, help="folder that `uld-sdk train` made")
    parser.add_argument("text")
    arguments = parser.parse_args()

    with UnlearnedClient(backend="openai", route="completions", base_url=arguments.base_url, assistant=arguments.assistant) as client:
        result = client.generate(arguments.text, max_new_tokens=32, raw=True)
        print(result.text)
        print(f"{result.report.changed} tokens changed, top {result.report.top_logprobs}")
        low, high = client.score(arguments.text, result.text, raw=True).bounds
        print(f"its log-probability lies between {low:.1f} and {high:.1f} nats")


if __name__ == "__main__":
    main()
