"""The command `rcka`, also as `python -m rcka`. Written by hand; separate from `rcka.cli`, which needs the packages of
rcka[notebook]."""

import sys

from rcka import optional_import


def main():
    "Run the command line; if a package is missing, print which one in one line and exit with status 2."
    try:
        with optional_import():
            from rcka.cli import main
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    main()


if __name__ == "__main__":
    main()
