"""TGI (text-generation-launcher --model-id MODEL --max-top-n-tokens 20): an answer that streams in, each piece verified.

python examples/tgi.py --base-url http://localhost:8080 --assistant ASSISTANT "a question"
"""

import argparse

from uld_sdk import UnlearnedClient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", required=True, help="address of the server")
    parser.add_argument("--assistant", required=True, help="folder that `uld-sdk train` made")
    parser.add_argument("question")
    arguments = parser.parse_args()

    with UnlearnedClient(backend="tgi", base_url=arguments.base_url, assistant=arguments.assistant) as client:
        for piece in client.stream(arguments.question, max_new_tokens=64):
            print(piece.text, end="", flush=True)
            if piece.result is not None:
                report = piece.result.report
                print(f"\n{report.requests} requests, {report.untouched} of {report.positions} positions untouched")


if __name__ == "__main__":
    main()
