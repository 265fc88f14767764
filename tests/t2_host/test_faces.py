"""How a driver without files ends: what is said of it, and its exit status."""

from __future__ import annotations

import pytest
import trio

from udf import DeviceGone
from udf.host import faces

GONE = "the device has been unplugged"


def ending_with(exc: BaseException) -> int:
    async def face() -> None:
        raise exc

    return trio.run(faces.serve, face)


@pytest.mark.parametrize(
    "exc",
    [DeviceGone(GONE), ExceptionGroup("", [ExceptionGroup("", [DeviceGone(GONE)])])],
    ids=["alone", "out of a nursery"],
)
def test_an_unplug_is_one_line_and_no_traceback(exc: Exception, capfd: pytest.CaptureFixture[str]) -> None:
    """Each unplug of a serial adapter left a traceback in the log."""
    assert ending_with(exc) == 1
    assert capfd.readouterr().err == f"{GONE}\n"


@pytest.mark.parametrize(
    "exc", [ValueError("a mistake"), ExceptionGroup("", [DeviceGone("unplugged"), ValueError("a mistake")])]
)
def test_a_mistake_of_the_driver_is_printed_in_full(exc: Exception, capfd: pytest.CaptureFixture[str]) -> None:
    assert ending_with(exc) == 1
    said = capfd.readouterr().err
    assert "Traceback" in said
    assert "ValueError: a mistake" in said
