"""Byte ranges of a file on an HTTP server."""

from __future__ import annotations

import os

import aiohttp

from swarmcpp.errors import DownloadFailed, NotReady
from swarmcpp.models.download import RETRY_STATUSES, request_headers


async def read_range(session: aiohttp.ClientSession, url: str, start: int, size: int, whole: int) -> bytes:
    """Bytes [start, start + size) of the file at `url`, which has `whole` of them. They are not checked.

    Raises NotReady for what another try may mend, DownloadFailed for what it will not.
    """
    end = start + size - 1
    headers = request_headers(url, os.environ.get("HF_TOKEN")) | {"Range": f"bytes={start}-{end}"}
    try:
        async with session.get(url, headers=headers) as response:
            if response.status in RETRY_STATUSES:
                raise NotReady(f"{url}: the server answers {response.status} {response.reason}")
            if response.status == 200:
                raise DownloadFailed(f"{url}: the server gives whole files only; pull the whole model, or ask a peer")
            found = response.headers.get("Content-Range", "")
            if response.status == 416 or (response.status == 206 and found != f"bytes {start}-{end}/{whole}"):
                raise DownloadFailed(f"{url}: has another file now than the model's {whole} bytes; ask a peer for it")
            if response.status != 206:
                raise DownloadFailed(f"{url}: HTTP {response.status} {response.reason}; check the url in models.toml")
            data = await _read(response, size)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise NotReady(f"{url}: {str(error)[:200] or type(error).__name__}") from None
    if len(data) != size:
        raise NotReady(f"{url}: the connection ended after {len(data)} of {size} bytes")
    return data


async def _read(response: aiohttp.ClientResponse, size: int) -> bytes:
    """The body up to one byte more than `size`, however long the server goes on."""
    data = bytearray()
    async for piece in response.content.iter_any():
        data += piece
        if len(data) > size:
            break
    return bytes(data)
