"""The command `pi0-serve`."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi0.command import add_checkpoint, add_preset, add_robot, exit_on_error, make_parser, output_path
from pi0.config import DTYPES
from pi0.plugins import require_extra
from pi0.policy.policy import Policy
from pi0.policy.rtc import METHODS
from pi0_serve.limits import SIZES, WAIT, Limits

if TYPE_CHECKING:
    from pi0_serve.keys import Keys

SWITCH = 0.001  # seconds a thread may hold Python while others wait, so that the event loop answers in milliseconds


@exit_on_error("pi0-serve")
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-serve`. Raises ValueError where two policies have one name."""
    args = _parser().parse_args(arguments)
    require_extra("serve", "starlette", "uvicorn", "msgpack", "prometheus_client", "websockets")
    from pi0_serve.engine import Engine
    from pi0_serve.recording import Recorder
    from pi0_serve.server import PolicyServer, check_address, make_uvicorn

    keys, limits, metadata = _keys(args), _limits(args), _metadata(args)
    check_address(args.host, keys, args.certificate, args.certificate_key)  # before weights are read
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    _log_access(args.access_log)
    sources = {args.name: args.checkpoint, **dict(args.policy)}
    if len(sources) != 1 + len(args.policy):
        raise ValueError(f"two policies have one name: {args.name}, {', '.join(name for name, _ in args.policy)}")
    recorder = None if args.record is None else Recorder(args.record, args.record_fps, by_name=len(sources) > 1)
    options = {"sizes": args.batch_sizes, "wait": args.batch_wait / 1e3, "subtask_every": args.subtask_every}
    engines = {name: Engine(load_policy(source, args), **options) for name, source in sources.items()}
    server = PolicyServer(engines, keys=keys, limits=limits, recorder=recorder, metadata=metadata)
    for name, engine in engines.items():
        print(f"{name}: compiling for batches of {', '.join(map(str, engine.sizes))}", flush=True)
        engine.warm_up()
    sys.setswitchinterval(SWITCH)
    tls, at = {"certificate": args.certificate, "certificate_key": args.certificate_key}, f"{args.host}:{args.port}"
    secure = "s" if args.certificate else ""
    for i, name in enumerate(engines):
        print(f"ws{secure}://{at}/{name if i else ''} serves {sources[name]}", flush=True)
    print(f"http{secure}://{at}/ shows it", flush=True)
    make_uvicorn(server, args.host, args.port, **tls).run()


def load_policy(source: str, args: argparse.Namespace) -> Policy:
    """A policy in the framework, with a sampler. Raises ValueError for --device with JAX."""
    names = ("robot", "preset", "action_horizon", "asset_id", "tokenizer", "dtype", "num_steps", "seed", "rtc")
    options: dict[str, Any] = {name: getattr(args, name) for name in names} | {"use_sampler": True}
    if args.device is not None:
        if args.framework != "torch":
            raise ValueError("--device is for PyTorch; for JAX set JAX_PLATFORMS")
        options["device"] = args.device
    return importlib.import_module(f"pi0_{args.framework}").Policy.from_pretrained(source, **options)


def _keys(args: argparse.Namespace) -> Keys | None:
    from pi0_serve.keys import ENVIRONMENT, Keys

    if args.keys is not None:
        return Keys.load(args.keys)
    text = os.environ.get(ENVIRONMENT)
    return Keys.parse(text, ENVIRONMENT) if text else None


def _limits(args: argparse.Namespace) -> Limits:
    names = ("connections", "rate", "idle", "drain")
    values = {name: getattr(args, name) for name in names}
    return Limits(max_message=args.max_message << 20, max_pixels=args.max_pixels, **values)


def _metadata(args: argparse.Namespace) -> dict[str, Any]:
    try:
        found = json.loads(args.metadata)
    except ValueError as error:
        raise ValueError(f"--metadata is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--metadata is {args.metadata!r:.80}; expected a JSON object")
    return found


def _log_access(target: str) -> None:
    """Lines of JSON for each connection and request: to a file, "-" for standard error, or "none"."""
    from pi0_serve.watch import access

    access.propagate = False
    if target != "none":
        handler = logging.StreamHandler(sys.stderr) if target == "-" else logging.FileHandler(output_path(target))
        handler.setFormatter(logging.Formatter("%(message)s"))
        access.addHandler(handler)
        access.setLevel(logging.INFO)


def _named(text: str) -> tuple[str, str]:
    """NAME=CHECKPOINT. Raises ValueError, which argparse reports."""
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=CHECKPOINT")
    return name, source


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "pi0-serve",
        "Serve a policy to robots, over openpi's websocket protocol: its clients work unchanged, and pi0_serve.Client "
        "does more. Requests of many robots are answered in batches. A page shows what the robots see and get.",
        "examples:\n"
        "  pi0-serve runs/demo/export\n"
        "  pi0-serve runs/aloha --framework jax --host 0.0.0.0 --keys keys.txt --record data/served\n"
        "  pi0-serve gs://openpi-assets/checkpoints/pi05_droid --preset pi05_droid --device cuda\n"
        "  pi0-serve runs/a --policy b=runs/b        # ws://127.0.0.1:8000/ and ws://127.0.0.1:8000/b\n\n"
        "keys.txt has a line for each key: NAME KEY, or NAME sha256:HEX. SIGTERM ends it when what runs is answered.",
    )
    add_checkpoint(parser)
    parser.add_argument("--name", default="policy", help="of this policy, to robots (default policy)")
    parser.add_argument(
        "--policy", type=_named, action="append", default=[], metavar="NAME=CHECKPOINT", help="another one, at /NAME"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1; others need --keys")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    parser.add_argument("--framework", choices=("torch", "jax"), default="torch", help="default torch")
    add_robot(parser)
    add_preset(parser)
    parser.add_argument("--action-horizon", type=int, metavar="N", help="where neither checkpoint nor preset says it")
    parser.add_argument("--tokenizer", metavar="FILE", help="where the checkpoint names none (default PaliGemma's)")
    parser.add_argument("--dtype", choices=DTYPES, help="compute dtype (default: the checkpoint's)")
    parser.add_argument("--device", help="of PyTorch (default cpu)")
    parser.add_argument("--num-steps", type=int, metavar="N", help="Euler steps (default: the checkpoint's)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--subtask-every", type=int, default=1, metavar="N", help="chunks that a subtask is kept for")
    parser.add_argument(
        "--rtc", choices=METHODS, help="real-time chunking: guided, or trained of checkpoints that were trained for it"
    )
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=list(SIZES), metavar="N", help="to compile (default %(default)s)"
    )
    parser.add_argument(
        "--batch-wait", type=float, default=1e3 * WAIT, metavar="MS", help="for others to join (default 2)"
    )
    parser.add_argument("--keys", type=Path, metavar="FILE", help="API keys (default: those in PI0_API_KEYS)")
    parser.add_argument("--certificate", type=Path, metavar="FILE", help="for TLS, a PEM file")
    parser.add_argument("--certificate-key", type=Path, metavar="FILE", help="its private key, if in another file")
    parser.add_argument("--record", type=output_path, metavar="FOLDER", help="a LeRobot dataset of what is answered")
    parser.add_argument("--record-fps", type=float, default=10, metavar="HZ", help="of its frames (default 10)")
    parser.add_argument("--metadata", default="{}", metavar="JSON", help="an object that robots are told beside ours")
    parser.add_argument("--access-log", default="-", metavar="FILE", help='"-": standard error (default), or "none"')
    limits, given = parser.add_argument_group("limits"), Limits()
    for flag, name, default, metavar, text in (
        ("--max-message", "max_message", given.max_message >> 20, "MIB", "of a message"),
        ("--max-pixels", "max_pixels", given.max_pixels, "N", "of an image"),
        ("--max-connections", "connections", given.connections, "N", "of a key"),
        ("--max-rate", "rate", given.rate, "HZ", "requests of a key"),
        ("--idle", "idle", given.idle, "S", "without a request"),
        ("--drain", "drain", given.drain, "S", "to answer what runs"),
    ):
        options: dict[str, Any] = {"type": type(default), "dest": name, "default": default, "metavar": metavar}
        limits.add_argument(flag, help=f"{text} (default %(default)d)", **options)
    return parser
