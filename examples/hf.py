"""A local transformers model, unlearned in this process: no server at all.

python examples/hf.py --model MODEL --assistant ASSISTANT "a question"
"""

import argparse

from uld_sdk import UnlearnedClient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub name of the large model")
    parser.add_argument("--assistant", required=True, help="folder that `uld-sdk train` made")
    parser.add_argument("question")
    arguments = parser.parse_args()

    with UnlearnedClient(backend="hf", model=arguments.model, assistant=arguments.assistant) as client:
        result = client.generate(arguments.question, max_new_tokens=64)
    print(result.text)
    print("the model's own answer" if result.untouched else f"{result.report.changed} tokens are not the model's own")


if __name__ == "__main__":
    main()
