"""How the exporter fails: in one line, safe to print whatever a file put into it."""


class Failure(Exception):
    """What went wrong, why, and what to do, in one line. `code`: 2 if another command line would mend it, else 1."""

    def __init__(self, message, code=1):
        super().__init__(one_line(message))
        self.code = code


def one_line(text):
    """Names and words out of files are a stranger's: on one line, not endless, and nothing a terminal obeys."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    return text if len(text) <= 2000 else f"{text[:1000]}...{text[-1000:]}"


def unsupported(feature, what="this checkpoint"):
    return Failure(f"{what}: uses {feature}, which speed does not have; take a checkpoint without it")


def damaged(path, why):
    return Failure(f"{path}: {why}; the file is damaged or incomplete, get it again")
