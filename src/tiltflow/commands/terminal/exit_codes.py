"""Exit codes: 0 success, 2 wrong input, 1 any other failure, 128 + n after signal n (130 Ctrl-C, 143 SIGTERM, 129 SIGHUP, 138
SIGUSR1)."""

from __future__ import annotations

import signal

from tiltflow.errors import InputError, Interrupted, TiltflowError

FAILURE = 1
WRONG_INPUT = 2
CTRL_C = 128 + signal.SIGINT


def exit_code(error: TiltflowError) -> int:
    """Return the exit code of a command that ends with this error.

    >>> exit_code(InputError("no such file")), exit_code(Interrupted("stopped", signal.SIGTERM))
    (2, 143)
    """
    if isinstance(error, Interrupted):
        return 128 + error.signal
    return WRONG_INPUT if isinstance(error, InputError) else FAILURE
