"""Arguments of the command line: what is wrong with them is one line, like every other error."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` without the many lines of usage before an error. Subparsers are of the same class.

    >>> parser = Parser(prog="robustflow train")
    >>> _ = parser.add_argument("--seed", type=int)
    >>> parser.parse_args(["--seed", "x"])  # on stderr
    Traceback (most recent call last):
    SystemExit: 2
    """

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; see `{self.prog} --help`\n")
