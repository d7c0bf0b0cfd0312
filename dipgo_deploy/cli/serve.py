"""``dipgo-serve``: engine directories behind HTTP."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dipgo_deploy.cli.common import entry_point, examples
from dipgo_deploy.cli.options import (
    PATH,
    Command,
    backend_option,
    batch_window_option,
    max_queue_option,
    option,
    threads_option,
    version_option,
)
from dipgo_deploy.errors import UserError

if TYPE_CHECKING:
    from dipgo_deploy.serve.service import Service


@click.command(
    name="dipgo-serve",
    cls=Command,
    epilog=examples(
        "dipgo-serve engines/fashion-sd",
        "dipgo-serve clothes=engines/fashion-sd engines/fashion-dit --host 0.0.0.0 --port 8080 --api-key-file key.txt",
    ),
)
@click.argument("directories", nargs=-1, required=True, metavar="[NAME=]DIR...")
@option(
    "Model",
    "--verify",
    is_flag=True,
    help="Check the hash of every file of the engine directories first; else a large one is hashed only once.",
)
@backend_option
@threads_option("the physical cores, for each directory")
@option("Server", "--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for all.")
@option("Server", "--port", type=click.IntRange(0, 65535), default=8000, help="Port; 0 takes a free one.")
@batch_window_option
@max_queue_option("Pictures that may wait, for each directory; more are refused with 503 and Retry-After.")
@option(
    "Server",
    "--max-images",
    type=click.IntRange(1, 1000),
    default=10,
    help="Pictures of one request at most.",
)
@option("Server", "--max-body", type=click.IntRange(min=1024), default=2**20, help="Bytes of one request at most.")
@option(
    "Server",
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    help="Seconds after which a request that is not drawn ends with 504; also those that a stop waits for.",
)
@option(
    "Server",
    "--api-key-file",
    type=PATH,
    show_default="the variable DIPGO_SERVE_API_KEY, else none",
    help="File with the bearer token that requests have to carry.",
)
@version_option
def command(
    directories: tuple[str, ...],
    verify: bool,
    backend: str,
    threads: int | None,
    host: str,
    port: int,
    batch_window: float,
    max_queue: int,
    max_images: int,
    max_body: int,
    timeout: float,
    api_key_file: Path | None,
) -> None:
    """Serve engine directories over HTTP, as OpenAI's /v1/images/generations and more. Needs no torch.

    Requests that fit together are drawn in one batch; each picture is the one that its seed gives alone. A model goes
    by the directory's name. SIGTERM ends it when all that was asked for is drawn.
    """
    import fastapi  # noqa: F401  # what is missing is said before anything is opened
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401

    from dipgo_deploy.serve.engine import open_engines
    from dipgo_deploy.serve.service import Service
    from dipgo_deploy.serve.settings import API_KEY, Settings, read_key

    key = read_key(api_key_file, os.environ.get(API_KEY))
    settings = Settings(
        directories=directories,
        backend=backend,
        threads=threads,
        verify=verify,
        window=batch_window,
        max_queue=max_queue,
        max_images=max_images,
        max_body=max_body,
        timeout=timeout,
        api_key=key,
    )
    listener = _listener(host, port)
    with listener:
        service = Service(open_engines(settings), settings)
        address = f"http://{_shown(host)}:{listener.getsockname()[1]}"
        click.echo(f"{address}: {', '.join(entry.id for entry in service.models())}", err=True)
        if key is None and not _is_loopback(host):
            click.echo(f"{host} can be reached from other machines, and no --api-key-file guards it", err=True)
        _serve(service, listener)


main = entry_point(command)


def _listener(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError where there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name of a host"
        raise UserError(f"--host {host} --port {port}: cannot be listened on ({reason}); give another") from None


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _serve(service: Service, listener: socket.socket) -> None:
    """Until SIGTERM or SIGINT; then what was taken is drawn. A second SIGINT ends it at once."""
    import uvicorn

    from dipgo_deploy.serve.web import create_app

    class Server(uvicorn.Server):
        """Ends with status 0 after a signal, as what it was asked to do is done then."""

        should_exit: bool

        def handle_exit(self, sig: int, frame: Any) -> None:
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            service.stop()  # requests on connections that are open are refused, too
            await super().shutdown(sockets)

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=max(1, round(service.settings.timeout)),
    )
    Server(config).run(sockets=[listener])
