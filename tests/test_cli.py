"""Settings made of options: bounds beside the defaults, refused in a sentence."""
from dataclasses import dataclass

import pytest

from utils.cli import InputError, check_bounds, option


@dataclass
class Numbers:
    count: int = option(1, "at least one", least=1)
    weight: float = option(0.0, "not negative", least=0)
    rate: float = option(1.0, "above zero", above=0)
    share: float = option(0.5, "a share that is not zero", above=0, most=1)
    cut: float = option(0.1, "a share", least=0, most=1)
    free: float = option(-3.0, "any finite number")
    level: float = option(0.5, "inside", above=0, below=1)
    late: int = option(3, "bounded from above", most=4)
    word: str = option("a", "a word", ("a", "b"))


@pytest.mark.parametrize("name, value, words", [
    ("count", 0, "at least 1"), ("weight", -0.1, "must not be negative"), ("rate", 0.0, "above 0"),
    ("share", 0.0, "above 0 and at most 1"), ("share", 1.1, "above 0 and at most 1"), ("cut", 1.1, "from 0 to 1"),
    ("free", float("nan"), "finite"), ("rate", float("inf"), "finite"), ("level", 1.0, "above 0 and below 1"),
    ("late", 5, "at most 4")])
def test_a_number_outside_its_bounds_is_refused_by_name(name, value, words):
    check_bounds(Numbers())
    with pytest.raises(InputError) as error:
        check_bounds(Numbers(**{name: value}))
    assert f"--{name} is {value}" in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_the_bounds_themselves_are_allowed_or_not():
    for allowed in (dict(count=1), dict(weight=0.0), dict(share=1.0), dict(cut=0.0), dict(cut=1.0), dict(late=4)):
        check_bounds(Numbers(**allowed))
    for refused in (dict(rate=0.0), dict(level=0.0), dict(level=1.0)):
        with pytest.raises(InputError):
            check_bounds(Numbers(**refused))
