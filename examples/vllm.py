"""vLLM (vllm serve MODEL): many questions at once, asynchronously, with their answers sampled but reproducible.

python examples/vllm.py --base-url http://localhost:8000 --assistant ASSISTANT "a question" "another"
"""

import argparse
import asyncio

from uld_sdk import AsyncUnlearnedClient


async def answer(base_url: str, assistant: str, questions: list[str]) -> None:
    async with AsyncUnlearnedClient(backend="vllm", base_url=base_url, assistant=assistant) as client:
        results = await client.generate_many(questions, concurrency=4, temperature=0.8, top_p=0.95, seed=1, max_new_tokens=64)
    for question, result in zip(questions, results, strict=True):
        print(f"{question}\n  {result.text}\n  [{result.report.mode}, {'untouched' if result.untouched else 'rewritten'}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", required=True, help="address of the server")
    parser.add_argument("--assistant", required=True, help="folder that `uld-sdk train` made")
    parser.add_argument("questions", nargs="+")
    arguments = parser.parse_args()
    asyncio.run(answer(arguments.base_url, arguments.assistant, arguments.questions))


if __name__ == "__main__":
    main()
