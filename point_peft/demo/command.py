"""The command demo: the page to try adapters, served on this machine."""

from __future__ import annotations

import argparse
import socket
import threading
from pathlib import Path
from typing import Any

from point_peft.demo.board import opened_board, sample_files
from point_peft.demo.handling import Handling
from point_peft.demo.page import gradio, launch, page
from point_peft.errors import PointPeftError
from point_peft.training.progress import say


def add_demo(commands: Any) -> None:
    """Give a command line this command."""
    command = commands.add_parser(
        "demo",
        help="try adapters on a page in the browser",
        description="Serve a page on which clouds and adapters can be chosen; Ctrl-C ends it.",
    )
    command.add_argument(
        "--adapter",
        metavar="FOLDER_OR_REPO",
        action="append",
        default=[],
        help="a run, an adapter or a repository of the Hub, beside those that come with the package; may be repeated",
    )
    command.add_argument("--host", default="127.0.0.1", help="to listen at (default: 127.0.0.1, this machine alone)")
    command.add_argument("--port", metavar="N", type=_port, help="0: any that is free (default: from 7860 on)")
    command.add_argument("--no-browser", action="store_true", help="do not open the page in the browser")
    command.set_defaults(run=demo)


def demo(options: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C; returns the exit code."""
    gradio()
    folder = Path.cwd()
    handling = Handling(opened_board(options.adapter), sample_files(), folder)
    blocks = page(handling)
    port = _free_port(options.host) if options.port == 0 else options.port
    address = launch(blocks, options.host, port, not options.no_browser, folder)
    say(f"the page is at {address}")
    try:
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)
    return 0


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 0 to 65535")
    return int(text)


def _free_port(host: str) -> int:
    """A port at which nothing listens."""
    try:
        with socket.create_server((host, 0)) as server:
            return int(server.getsockname()[1])
    except OSError as error:
        raise PointPeftError(f"--host {host!r} cannot be listened at: {error}") from error
