"""Numbers that would do, in words, for the remedies of problems."""


def divisors(n: int) -> str:
    """Return the divisors of a number."""
    return either([d for d in range(1, n + 1) if n % d == 0])


def multiples_near(value: int, step: int) -> str:
    """Return the multiples of a step next to a value."""
    below = value // step * step
    return either([n for n in (below, below + step) if n > 0])


def either(numbers: list[int]) -> str:
    """Join numbers by commas and or."""
    words = [str(n) for n in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
