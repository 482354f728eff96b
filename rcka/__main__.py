"The command `rcka`, also as `python -m rcka`. Written by hand, and apart from `rcka.cli`, which needs the packages of rcka[notebook]."

import sys

from rcka import optional_import


def main():
    "Run the command line, or say in one line what it lacks."
    try:
        with optional_import():
            from rcka.cli import main
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    main()


if __name__ == "__main__":
    main()
