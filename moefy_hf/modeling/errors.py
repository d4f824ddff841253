"""The error that says what is wrong with a model, a setting or data; it travels with the code that raises it."""


class MoefyError(ValueError):
    """Something about the input is wrong, and the message says what would do.

    Example:
        >>> try:
        ...     model.set_selection(k=1.5)
        ... except MoefyError as error:
        ...     print(error)
    """
