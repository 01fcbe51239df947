"""Train an assistant from Python: a forget set, a retain set, and a small model that shares the large one's tokenizer.

python examples/train.py --base MODEL --forget forget.jsonl --retain retain.jsonl --output ASSISTANT
"""

import argparse

from uld_sdk import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True, help="folder, hub name or GGUF file of the small model")
    parser.add_argument("--forget", required=True, help="JSONL, CSV or Parquet with question and answer, messages, or text")
    parser.add_argument("--retain", required=True, help="the same for what must stay; near neighbours of the topic help most")
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument("--steps", type=int, default=None)
    arguments = parser.parse_args()

    result = train(
        base=arguments.base,
        forget=arguments.forget,
        retain=arguments.retain,
        output=arguments.output,
        steps=arguments.steps,
        progress=False,
    )
    losses = result.manifest.losses
    print(f"{result.path}: {result.seconds:.1f} s, {result.manifest.steps} steps")
    print(f"remember {losses['remember']:.3f} nats, uniform {losses['uniform']:.4f} nats")


if __name__ == "__main__":
    main()
