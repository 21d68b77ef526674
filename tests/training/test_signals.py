"""The first signal becomes a flag, the second one ends, and ignored ones stay so."""

import signal
import threading

import pytest

from jaxkd.training.signals import StopSignal

BOTH = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def handlers():
    """Puts the handlers of the session back, and notes what reaches those of a test."""
    before = {number: signal.getsignal(number) for number in BOTH}
    reached = []
    for number in BOTH:
        signal.signal(number, lambda number, frame: reached.append(number))
    yield reached
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", BOTH)
def test_the_first_signal_is_a_flag_and_the_second_goes_its_old_way(handlers, number):
    with StopSignal() as stop:
        assert stop.received is None
        signal.raise_signal(number)
        assert stop.received == signal.Signals(number).name and handlers == []
        signal.raise_signal(number)
        assert handlers == [number]


def test_the_handlers_are_put_back_at_the_end(handlers):
    with StopSignal():
        pass
    for number in BOTH:
        signal.raise_signal(number)
    assert handlers == list(BOTH)


def test_a_signal_that_was_ignored_stays_ignored(handlers):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == "SIGTERM"
        signal.raise_signal(signal.SIGINT)
    assert handlers == [] and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_another_thread_leaves_the_handlers_alone(handlers):
    before = [signal.getsignal(number) for number in BOTH]
    found = []

    def run():
        with StopSignal() as stop:
            found.append((stop.received, [signal.getsignal(n) for n in BOTH]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(None, before)]
