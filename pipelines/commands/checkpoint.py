"""`mae checkpoint`: describe weights, and convert them to the formats of others.

    mae checkpoint show WEIGHTS [--json]
    mae checkpoint convert WEIGHTS OUT --to mae|fair|timm|hf|safetensors|onnx [--overwrite]

WEIGHTS is what init_from takes: a checkpoint, a run's folder, run:latest or run:NAME, a file of the
MAE authors or of timm, a file or folder of Hugging Face; local or s3://. No code in a file is run.

    mae          a checkpoint of ours (a folder)
    fair         the MAE authors' file: {'model': ...}, with the decoder if there is one
    timm         the encoder for timm's VisionTransformer (.pth, or .safetensors)
    hf           Hugging Face's ViTMAE (a folder)
    safetensors  one file in the authors' names, with the decoder if there is one
    onnx         the encoder from raw pixels on: any batch and size; needs mae-pipeline[onnx]
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from infra.config import StorageConfig
from infra.redaction import redact
from pipelines.terminal import progress

FORMATS = ("mae", "fair", "timm", "hf", "safetensors", "onnx")
ACTIONS = ("show", "convert")
OPTIONS = ("--to", "--overwrite", "--json", "--debug")


def command(words: Sequence[str]) -> int:
    """Run `mae checkpoint WORDS`; return the exit code."""
    arguments = _parser().parse_args(words)
    root = arguments.root or os.environ.get("MAE__STORAGE__ROOT") or StorageConfig().root
    doing = "converting" if arguments.action == "convert" else "reading"
    with progress.doing(f"{doing} the weights"):
        said = (
            _convert(arguments, root) if arguments.action == "convert" else _show(arguments, root)
        )
    sys.stdout.write(said)
    return 0


# Below, imports are in the functions, because help and mistakes need neither torch nor a store.


def _convert(arguments: argparse.Namespace, root: str) -> str:
    from pipelines.training.conversion import convert
    from pipelines.training.init_from import locate

    place = locate(arguments.weights, root)
    made = convert(place, arguments.out, arguments.to, overwrite=arguments.overwrite)
    return f"{made}\n"


def _show(arguments: argparse.Namespace, root: str) -> str:
    from pipelines.training.description import describe_place
    from pipelines.training.init_from import locate

    fields = describe_place(locate(arguments.weights, root))
    if arguments.json:
        return redact(json.dumps(fields)) + "\n"
    width = max(len(name) for name in fields)
    lines = [redact(f"{name.ljust(width)}  {value}") for name, value in fields.items()]
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mae checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="show | convert")
    show = actions.add_parser("show", help="describe the weights")
    show.add_argument("weights", metavar="WEIGHTS", help="what init_from takes")
    show.add_argument("--json", action="store_true", help="print one JSON object")
    convert = actions.add_parser("convert", help="write them in another format")
    convert.add_argument("weights", metavar="WEIGHTS", help="what init_from takes")
    convert.add_argument("out", metavar="OUT", help="a file; for hf and mae a folder")
    convert.add_argument("--to", required=True, choices=FORMATS, help="the layout")
    convert.add_argument("--overwrite", action="store_true", help="replace what lies at OUT")
    for action in (show, convert):
        action.add_argument("--root", help="storage.root, where run:NAME is looked for")
        action.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser
