"""Progress where there is no terminal."""

import pytest

from experiments.display import Line


@pytest.mark.parametrize("count", [3, 10, 245])
def test_plain_lines_stand_at_every_tenth_and_at_the_end(count: int, capsys: pytest.CaptureFixture[str]):
    line = Line()
    for k in range(1, count + 1):
        line.show(k / count, str(k))
    line.show(1.0, "again")
    shown = [int(text) for text in capsys.readouterr().out.split()]
    # The first step, and the first step in each further tenth: of 245 those numbered 1, 25, 49, 74 ... 221, 245.
    assert shown == sorted({1, *(-(-k * count // 10) for k in range(1, 11))})
