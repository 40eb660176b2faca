"""The one exception type that a user of dpjax is meant to read."""


class DpjaxError(ValueError):
    """Bad input, in one line: what was wrong, the value found, and the remedy.

    The command line prints the message alone and exits with code 2. It subclasses ``ValueError``,
    so library users need not know this class to catch it.

    Example:
      >>> raise DpjaxError("target_epsilon is -1.0; it must be positive; pass e.g. 8.0")
      Traceback (most recent call last):
      ...
      dpjax.errors.DpjaxError: target_epsilon is -1.0; it must be positive; pass e.g. 8.0
    """
