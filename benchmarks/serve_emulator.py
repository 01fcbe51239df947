"""The emulator in a process of its own, so that it shares no interpreter with the client that is timed.

Usage: python serve_emulator.py MODEL DIALECT ROUND_TRIP SECONDS_PER_TOKEN. Prints its address and serves until its input closes.
Requests without a seed all get the same one: a sampled answer to one prompt is then the same each time, so that the memo holds it
and the plain stream and the client are timed on the same text.
"""

import sys

from uld_adapters.emulator import EmulatorServer, build_app


def main() -> None:
    model, dialect, round_trip, seconds_per_token = sys.argv[1:]
    times = {"round_trip": float(round_trip), "seconds_per_token": float(seconds_per_token)}
    with EmulatorServer(build_app(model, dialect=dialect, max_top_n_tokens=20, memo=True, seed=20240607, **times)) as server:
        print(server.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
