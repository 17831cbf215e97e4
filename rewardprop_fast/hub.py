"""Whether the model hub can be reached, asked in a way that never hangs."""

from __future__ import annotations

import socket
import threading
import urllib.request
from urllib.parse import urlsplit


def reachable(seconds: float = 3.0) -> bool:
    """Whether the hub, or the proxy that leads to it, takes a connection within `seconds`.

    The hub's own client retries for minutes where packets vanish, and says so line by line.
    HF_HUB_OFFLINE=1 is a no at once; HF_ENDPOINT names another hub.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    hub = urlsplit(constants.ENDPOINT)
    host = hub.hostname or ""
    proxy = urllib.request.getproxies().get(hub.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        hub = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (hub.hostname or "", hub.port or (443 if hub.scheme == "https" else 80))
    answers: list[bool] = []

    def ask() -> None:
        try:
            socket.create_connection(address, timeout=seconds).close()
            answers.append(True)
        except OSError:
            answers.append(False)

    # In a thread, because looking up a name has no time limit of its own.
    thread = threading.Thread(target=ask, name="hub-reachable", daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers) and answers[0]
