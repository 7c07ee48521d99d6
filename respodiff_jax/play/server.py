"""Serves the page."""

import logging
import socket
import threading
import webbrowser

import uvicorn

from respodiff_jax.play.page import mount
from respodiff_jax.play.studio import Studio


def serve(studio: Studio, listening: socket.socket, open_browser: bool = False) -> None:
    """Serves the page until Ctrl-C.

    Args:
      studio: the model and its adapters.
      listening: a socket that listens. A browser that is opened early waits for the server.
      open_browser: also open the page in a browser.
    """
    # Chromium asks for source maps and the like, which are not there.
    logging.getLogger("nicegui").setLevel(logging.ERROR)
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    server = uvicorn.Server(uvicorn.Config(mount(studio), log_level="warning"))
    threading.Thread(target=studio.warm_up, daemon=True).start()
    print(f"open {address} (Ctrl-C stops)", flush=True)
    if open_browser:
        webbrowser.open(address)
    server.run(sockets=[listening])
