"""A chat API of the OpenAI kind: an answer that streams in, refused where the assistant would change it.

The API itself goes on from no answer but its own, so that a changed answer cannot be finished: it is refused. Servers that continue
a last message of the assistant's (vLLM, llama.cpp, Mistral, DeepSeek) rewrite it with --rewrite.

export ULD_API_KEY=...
python examples/openai_chat.py --base-url https://api.openai.com/v1 --model MODEL --tokenizer o200k_base --assistant ASSISTANT "a question"
"""

import argparse
import os

from uld_sdk import UnlearnedClient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", required=True, help="address of the server, as the official client takes it")
    parser.add_argument("--assistant", required=True, help="folder that `uld-sdk train` made")
    parser.add_argument("--model", help="name of the model; not needed where one is served")
    parser.add_argument("--tokenizer", help="of the served model: a folder, a tiktoken name or file; else the assistant's")
    parser.add_argument("--rewrite", action="store_true", help="rewrite instead of refusing")
    parser.add_argument("question")
    arguments = parser.parse_args()

    with UnlearnedClient(
        backend="openai",
        base_url=arguments.base_url,
        model=arguments.model,
        tokenizer=arguments.tokenizer,
        api_key=os.environ.get("ULD_API_KEY"),
        assistant=arguments.assistant,
        on_touched="rewrite" if arguments.rewrite else "refuse",
    ) as client:
        print(f"continues answers: {client.capabilities.continues}, top {client.capabilities.top_logprobs}")
        for piece in client.stream(arguments.question, max_new_tokens=64):
            print(f"\n{piece.text}" if piece.replaces else piece.text, end="", flush=True)
            if piece.result is not None:
                report = piece.result.report
                print(f"\n{piece.finish_reason}: {report.untouched} of {report.positions} positions untouched")


if __name__ == "__main__":
    main()
