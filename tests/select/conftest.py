"""What the tests of selections share."""

import pytest

from jaxkd.select import SelectionData


@pytest.fixture
def data():
    return SelectionData(records=23, batch_size=4, steps_per_epoch=5, epochs=4)
