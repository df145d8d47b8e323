"""A command that is stopped must not leave a server behind."""

import signal
from types import FrameType


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handler of SIGTERM: end as Ctrl-C does, through every ``with`` block."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background job ignores Ctrl-C; the signal would be lost.
        raise KeyboardInterrupt
    # As the signal, not the exception: asyncio makes an orderly end of it, too.
    signal.raise_signal(signal.SIGINT)
