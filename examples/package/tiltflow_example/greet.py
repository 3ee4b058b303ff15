"""`tiltflow greet`: say hello."""


def greet(name: str) -> None:
    """Say hello to NAME."""
    print(f"hello, {name}")
