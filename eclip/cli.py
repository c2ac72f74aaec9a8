"""The `eclip` command: `eclip pack ...` is `python -m eclip.dataloading.pack ...`, and so on, by the same main.

    eclip COMMAND [FLAGS]; eclip COMMAND --help

A command is imported when it was asked for: torch takes seconds, and `eclip --help` needs none of it.
"""

import sys
from collections.abc import Sequence
from difflib import get_close_matches

from eclip import __version__
from eclip.dataloading.system.console import say

COMMANDS = {
    "pack": "a table and a folder of images into shards",
    "train": "train, then evaluate",
    "evaluate": "a trained run on products that training has not seen",
    "export": "a trained run into one folder: weights, settings, tokenizer, card, ONNX",
    "embed": "a catalogue into an index that can be searched",
    "search": "an index by words, by photo or by a region of a photo",
    "serve": "a page and an API to search an index with",
    "demo": "the embedded catalogue into shards",
}
"""Every command with its line of --help; `_run` has a case for each."""


def main(argv: Sequence[str] | None = None, *, prog: str = "eclip") -> int:
    """Run the command that argv (default: sys.argv) begins with. Returns the exit status, or ends with it.

    prog: how this was started, for messages and --help.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        say(_help(prog), sys.stderr, end="")
        return 2
    command, *rest = arguments
    if command in ("-h", "--help"):
        say(_help(prog), end="")
        return 0
    if command == "--version":
        say(f"eclip {__version__}")
        return 0
    if command not in COMMANDS:
        say(f"{prog}: error: {_unknown(command, prog)}", sys.stderr)
        return 2
    return _run(command, rest, f"{prog} {command}")


def _run(command: str, arguments: Sequence[str], prog: str) -> int:
    """As `python -m` does it."""
    match command:
        case "pack":
            from eclip.dataloading import pack

            pack.main(arguments, prog=prog)
        case "train":
            from eclip import train
            from eclip.parallel.ending import leave

            leave(train.main(arguments, prog=prog))
        case "evaluate":
            from eclip.evaluate import __main__ as evaluate

            evaluate.main(arguments, prog=prog)
        case "export":
            from eclip.export import __main__ as export

            export.main(arguments, prog=prog)
        case "embed":
            from eclip.parallel.ending import leave
            from eclip.search.embed import __main__ as embed

            leave(embed.main(arguments, prog=prog))
        case "search":
            from eclip.search import __main__ as search

            search.main(arguments, prog=prog)
        case "serve":
            from eclip.serve import __main__ as serve

            serve.main(arguments, prog=prog)
        case "demo":
            from eclip.dataloading.demo import pack as demo

            demo.main(arguments, prog=prog)
    return 0


def _help(prog: str) -> str:
    lines = [
        f"usage: {prog} COMMAND [FLAGS]",
        "",
        "ECLIP: instance-level vision-language pretraining for e-commerce",
        "",
    ]
    lines += [f"  {command:10}{line}" for command, line in COMMANDS.items()]
    lines += ["", f"{prog} COMMAND --help lists the flags of a command, {prog} --version says the version."]
    lines += ["On several devices: torchrun --nproc_per_node=N -m eclip train [FLAGS], and embed likewise"]
    return "\n".join(lines) + "\n"


def _unknown(argument: str, prog: str) -> str:
    """What is no command, and the one that looks like it."""
    commands = f"Commands: {', '.join(COMMANDS)}"
    if not argument:
        return f"the command is empty (a variable of the shell that is not set?). {commands}"
    if argument.startswith("-"):
        return f"{argument}: a command comes before its flags ({prog} COMMAND [FLAGS]). {commands}"
    if near := get_close_matches(argument.lower(), COMMANDS, n=1):
        return f"{argument}: no such command; did you mean {near[0]}? {commands}"
    return f"{argument}: no such command. {commands}"


if __name__ == "__main__":
    sys.exit(main(prog="python -m eclip.cli"))
