"""What is wrong with one sample, as opposed to wrong with the program."""


class BadSample(Exception):
    """A sample that cannot be used; its text is one line that names the file and the reason."""

    def __init__(self, file: str, reason: str):
        super().__init__(file, reason)
        self.file = file
        self.reason = " ".join(reason.split())

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"
