"""The errors that a user can mend; programs print them as one line, without a traceback."""


class UserError(ValueError):
    """Says in one line which value is wrong, what is allowed, and what to do."""
