"""The base of every error whose message is for the person at the command line."""


class UserError(Exception):
    """One line that names the thing and the cure; the command line prints it without a traceback."""
