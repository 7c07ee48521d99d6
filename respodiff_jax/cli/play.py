"""`respodiff play`."""

import argparse
import socket

from respodiff_jax.cli import inputs
from respodiff_jax.errors import UserError

SUMMARY = "open a page to try adapters"

DESCRIPTION = """\
Serves a page on this machine: pictures before and after, side by side from the same noise, with a
slider for each concept, fair shares and safety. It also counts pictures of a profession, and draws
strips from -1 to +1 of a concept. Without options it has Emoji World and the adapters of the
package. It loads nothing from the network.
"""

EPILOG = """\
  respodiff play
  respodiff play --adapter runs/gender --adapter adapters/safety
  respodiff play --model CompVis/stable-diffusion-v1-4 --adapter owner/name
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    inputs.add_model_arguments(parser)
    add = parser.add_argument_group("page").add_argument
    add("--resolution", type=int, metavar="PIXELS", help="default: the adapter's, or the model's")
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to serve on (default: %(default)s, this machine only). With another address,"
        " such as 0.0.0.0, everybody who can reach this machine can use the page: it has no"
        " password and no encryption",
    )
    add("--port", type=int, default=7860, metavar="N", help="default: %(default)s; 0: any free one")
    add("--open", action="store_true", help="also open the page in a browser")


def run(args: argparse.Namespace) -> None:
    inputs.check_sources(args.adapter)
    listening = _listen(args.host, args.port)

    import respodiff_jax as rd
    from respodiff_jax.emoji import shipped
    from respodiff_jax.play.studio import check_library, open_studio
    from respodiff_jax.training.distributed import enable_compilation_cache

    check_library()
    from respodiff_jax.play.server import serve

    enable_compilation_cache()
    if not args.model and not args.adapter:
        args.model = shipped.MODEL
    inputs.use_cores(args)
    adapters = [rd.load_adapter(path) for path in args.adapter]
    model = inputs.open_model(args, adapters)
    print(f"loading {model.identity['name']}", flush=True)
    studio = open_studio(model, adapters, args.adapter, args.resolution)
    if studio.hint:
        print(studio.hint.replace("`", ""), flush=True)
    serve(studio, listening, args.open)


def _listen(host: str, port: int) -> socket.socket:
    """Takes the address before anything is loaded."""
    listening = None
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()  # until then, another program could take the same address
    except (OSError, OverflowError) as error:
        if listening is not None:
            listening.close()
        raise UserError(
            f"--host {host} --port {port} cannot be used: {error}; choose another port, or stop the"
            " program that has it"
        ) from error
    return listening
