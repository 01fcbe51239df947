"""llama.cpp (llama-server -m MODEL.gguf): an answer, the probability of a given text, and a refusal in place of a rewrite.

python examples/llamacpp.py --base-url http://localhost:8080 --assistant ASSISTANT "a question" --text "a text to score"
"""

import argparse

from uld_sdk import UnlearnedClient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", required=True, help="address of the server")
    parser.add_argument("--assistant", required=True, help="folder that `uld-sdk train` made")
    parser.add_argument("question")
    parser.add_argument("--text", default="I do not know.", help="what the answer might have been")
    arguments = parser.parse_args()

    reach = {"backend": "llamacpp", "base_url": arguments.base_url, "assistant": arguments.assistant}
    with UnlearnedClient(**reach) as client:
        print(client.generate(arguments.question, max_new_tokens=64).text)
        score = client.score(arguments.question, arguments.text)
        low, high = score.bounds
        print(f"log q({arguments.text!r}) lies between {low:.2f} and {high:.2f} nats")
    with UnlearnedClient(**reach, on_touched="refuse", refusal="I would rather not say.") as client:
        print(client.generate(arguments.question, max_new_tokens=64).text)


if __name__ == "__main__":
    main()
