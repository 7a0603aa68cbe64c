"""A plan that its operation refuses."""


def refuse() -> None:
    """As an operation does with what its kernels do not cover."""
    raise ValueError("x.shape was (3,); it must be even")


PLANS = {"odd": refuse}
