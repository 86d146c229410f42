"""Errors of the library's own."""


class LabelError(IndexError, ValueError):
    """A class label is none: out of range, a fraction, or missing.

    It is an `IndexError`, as indexing the classes with it would raise, and a `ValueError`, as other
    libraries raise for bad data. The message gives the position, the value and the range.
    """


LabelError.__module__ = "xce"  # the name that users know it by
