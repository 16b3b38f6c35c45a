"""Whether a W&B server can be used from here: whether there is a key for it and a connection to it."""

from __future__ import annotations

import netrc
import os
import socket
import urllib.parse
import urllib.request
from pathlib import Path

CONNECT_SECONDS = 3.0


def has_key(address: str) -> bool:
    """Whether the environment or the netrc file holds a key for the server at `address`."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    path = Path(os.environ.get("NETRC") or os.path.expanduser("~/.netrc"))
    try:
        return netrc.netrc(path).authenticators(urllib.parse.urlsplit(address).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def is_reachable(address: str) -> bool:
    """Whether a connection to `address`, or to the proxy for it, opens within three seconds."""
    server = urllib.parse.urlsplit(address)
    proxy = urllib.request.getproxies().get(server.scheme)
    if proxy and not urllib.request.proxy_bypass(server.hostname or ""):
        server = urllib.parse.urlsplit(proxy)
    port = server.port or (443 if server.scheme == "https" else 80)
    try:
        socket.create_connection((server.hostname, port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
