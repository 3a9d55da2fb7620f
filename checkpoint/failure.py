"""How the exporter fails: with one line. It is safe to print, even if it quotes a hostile file."""


class Failure(Exception):
    """One line: what went wrong, why, and what to do. `code` is 2 if another command line would help, else 1."""

    def __init__(self, message, code=1):
        super().__init__(one_line(message))
        self.code = code


def one_line(text):
    """The text on one line, of limited length, without control characters. It may quote a hostile file."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    return text if len(text) <= 2000 else f"{text[:1000]}...{text[-1000:]}"


def unsupported(feature, what="this checkpoint"):
    return Failure(f"{what}: uses {feature}, which speed does not have; take a checkpoint without it")


def damaged(path, why):
    return Failure(f"{path}: {why}; the file is damaged or incomplete, get it again")
