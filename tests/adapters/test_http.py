"""Addresses that are none, and answers in a broken encoding."""

import httpx2
import pytest

from uld_adapters.errors import MalformedAnswer, UsageError
from uld_adapters.http import HttpClient


@pytest.mark.parametrize("address", ["http://[::1", "http://", "http://host:port", "http://host:99999", "https://", "host:80"])
def test_an_address_that_is_none(address: str | None) -> None:
    with pytest.raises(UsageError, match="base_url") as caught:
        HttpClient(address)
    assert 'base_url="http://host:port"' in caught.value.hint


@pytest.mark.parametrize("address", ["", None])
def test_no_address(address: str | None) -> None:
    with pytest.raises(UsageError, match="no base_url was given") as caught:
        HttpClient(address)
    assert caught.value.hint == 'pass base_url="http://host:port" (--base-url, or ULD_BASE_URL)'


@pytest.mark.parametrize("address", ["http://[::1]:8080", "https://host/v1", "http://10.0.0.1"])
def test_an_address_that_is_one(address: str) -> None:
    assert HttpClient(address).base_url == address.removesuffix("/v1")


async def test_a_broken_encoding_is_a_malformed_answer() -> None:
    def handle(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-encoding": "gzip"}, content=b"no gzip at all")

    async with httpx2.AsyncClient(transport=httpx2.MockTransport(handle)) as http:
        client = HttpClient("http://server", http_client=http, max_retries=0)
        with pytest.raises(MalformedAnswer, match="broken encoding"):
            await client.request("GET", "/info")
        with pytest.raises(MalformedAnswer, match="broken encoding"):
            _ = [event async for event in client.events("/generate_stream", {})]
