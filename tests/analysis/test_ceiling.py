"""The measured ceiling of a matrix product."""

import pytest

from jaxkd.analysis import ceiling


def test_the_ceiling_is_measured_once_and_plausible(monkeypatch):
    monkeypatch.setattr(ceiling, "_SIZES", {"cpu": 128})
    ceiling.matmul_ceiling.cache_clear()
    first = ceiling.matmul_ceiling("float32")
    # A CPU does more than 10 MFLOP/s and less than 1 PFLOP/s.
    assert 1e7 < first < 1e15
    assert ceiling.matmul_ceiling("float32") == first
    assert ceiling.matmul_ceiling("bfloat16") > 0
    ceiling.matmul_ceiling.cache_clear()


def test_an_unknown_dtype_is_refused():
    with pytest.raises(TypeError):
        ceiling.matmul_ceiling("float31")
