"""No fault is lost or silent: tests/helpers/faults.py injects and counts them."""

import pytest

from tests.helpers.faults import count_faults


@pytest.mark.slow
def test_nothing_is_lost_or_silent(tmp_path):
    counts = count_faults(tmp_path)
    assert counts["flip in a record"]["noticed"] == 24
    assert sum(row["injected"] for row in counts.values()) == 24 + 24 + 12 + 1 + 10 + 10
    for kind, row in counts.items():
        assert row["silent"] == row["lost"] == 0, (kind, row)
