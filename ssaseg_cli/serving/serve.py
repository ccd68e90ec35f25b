"""The command `ssaseg serve`: opens files, starts the server, and waits for a signal."""

import secrets
import webbrowser
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ssaseg.cli.engine.opening import device_for, open_file
from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.lanes import leave_if_busy
from ssaseg.cli.scoring.limit import memory_limit
from ssaseg.cli.serving.app import App, Limits
from ssaseg.cli.serving.networks import Network, names_of
from ssaseg.cli.serving.server import bound_socket, listening, require_uvicorn
from ssaseg.cli.signals import StopSignal

LOCAL = ("127.0.0.1", "localhost", "::1")


def run_serve(
    files: Sequence[Path],
    host: str,
    port: int,
    limits: Limits,
    open_page: bool,
    device: str,
    classes: str | None,
    protocol: str | None,
    changes: Mapping[str, Any],
) -> int:
    """Serves one file or two until Ctrl-C or SIGTERM; returns 130 or 143.

    host, port: where to listen; port 0: one that is free. open_page: whether to open the page in a browser. device,
    classes, protocol: as `device_for` and `open_file` take them. changes: keys of the test protocol to change. Prints
    the address as the only line on stdout. A second signal ends the process. Raises CommandError for a missing package,
    an address that cannot be used, and what opening a file raises.
    """
    require_uvicorn()
    with bound_socket(host, port) as bound:  # now, rather than after the files are read
        opened = [open_file(path, classes, protocol) for path in files]
        devices = [device_for(each, device) for each in opened]
        networks = [Network.of(*each, changes) for each in zip(opened, devices, names_of(files), strict=True)]
        token = secrets.token_urlsafe(24)
        app = App(networks, token, limits, hosts=[host])
        where = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        address = f"http://{where}:{bound.getsockname()[1]}/?token={token}"
        on_cpu = all(each.type == "cpu" for each in devices)
        stop = StopSignal(hasty=True)
        try:
            with stop, memory_limit() if on_cpu else nullcontext(), listening(app, bound, limits.seconds) as thread:
                for network in networks:
                    facts = network.facts(0)
                    echo(f"{facts['name']}: {facts['network']}; computed by {facts['computed_by']}", err=True)
                if host not in LOCAL:
                    warning = f"others can reach {host}, and read along: the connection is not encrypted"
                    echo(warning, err=True, label="warning:", colour="yellow")
                echo("open this address, or send images to it (docs/serve.md); Ctrl-C ends it", err=True)
                echo(address)
                if open_page:
                    webbrowser.open_new_tab(address)
                while thread.is_alive() and not stop.requested:
                    thread.join(0.2)
        except (KeyboardInterrupt, SystemExit):
            leave_if_busy(stop)
            raise
        finally:
            app.pool.shutdown(wait=False, cancel_futures=True)
    if not stop.requested:
        raise CommandError("the server has ended by itself\nSSASEG_DEBUG=1 may show why; start it again")
    echo("stopped", err=True)
    return stop.exit_code
