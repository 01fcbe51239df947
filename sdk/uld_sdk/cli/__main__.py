"""`python -m uld_sdk.cli` is the script `uld-sdk`."""

from uld_sdk.cli import main

main()
