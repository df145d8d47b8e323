"""A command that is stopped must not leave a server behind."""

from types import FrameType


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handler of SIGTERM: end as Ctrl-C does, through every ``with`` block."""
    raise KeyboardInterrupt
