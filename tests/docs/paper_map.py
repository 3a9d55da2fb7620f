"""docs/map.md: each function, test and command that the map names exists."""

PLANTED = []


def faults(text, command_fault):
    if text is None:
        return
    yield from ()
