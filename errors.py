"""The one exception for bad input: a sentence that names file, line and field and says what to do."""

import sys
from collections.abc import Callable


class InputError(Exception):
    """The user's input cannot be used. The message is one sentence for a person; a traceback would add nothing."""


def run(main: Callable[[], None]) -> None:
    """Run a script's main(): an InputError ends it with exit code 2 and its sentence on stderr."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
