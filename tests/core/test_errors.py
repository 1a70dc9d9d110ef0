"""The tree of errors, as its docstring draws it."""

from __future__ import annotations

import pytest

from hfq.core import errors


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.UnknownNameError, LookupError),
        (errors.WeightError, ValueError),
        (errors.CheckpointError, ValueError),
        (errors.VersionError, errors.CheckpointError),
        (errors.CalibrationError, ValueError),
        (errors.KernelError, RuntimeError),
    ],
)
def test_every_error_is_ours_and_a_builtin(
    error: type[Exception], builtin: type[Exception]
) -> None:
    assert issubclass(error, errors.HfqError) and issubclass(error, builtin)


def test_the_docstring_draws_every_error() -> None:
    assert errors.__doc__ is not None
    for name in errors.__all__:
        if name[0].isupper():
            assert name in errors.__doc__


def test_nearest_suggests_only_what_is_near() -> None:
    assert errors.nearest("grup_size", ["bits", "group_size"]) == " Did you mean 'group_size'?"
    assert errors.nearest("zzz", ["bits", "group_size"]) == ""
