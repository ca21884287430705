"""A process' log: bounded, numbered, read on from where reading stopped."""

from __future__ import annotations

from slipstream.runtime.controller.process_log import MAX_BYTES, MAX_LINES, PAGE_LINES, LogPage, ProcessLog


def filled(count: int) -> ProcessLog:
    log = ProcessLog()
    for number in range(count):
        log.add(str(number))
    return log


def test_it_is_read_on_from_where_reading_stopped() -> None:
    log = filled(3)
    assert log.page(-2) == LogPage(lines=("1", "2"), next=3)
    assert log.page(3) == LogPage(next=3)
    log.add("more")
    assert log.page(3) == LogPage(lines=("more",), next=4)
    assert log.page(-100) == LogPage(lines=("0", "1", "2", "more"), next=4)
    # Whoever is ahead, of another process, is not told what it has not missed.
    assert log.page(50) == LogPage(next=4)
    assert ProcessLog().page(-5) == LogPage()


def test_pages_are_bounded_and_follow_one_another() -> None:
    log, begin = filled(PAGE_LINES + 10), 0
    read: list[str] = []
    while page := log.page(begin).lines:
        assert len(page) <= PAGE_LINES
        read += page
        begin = log.page(begin).next
    assert read == [str(number) for number in range(PAGE_LINES + 10)]


def test_what_is_gone_is_counted() -> None:
    log = filled(MAX_LINES + 7)
    page = log.page(2)
    assert (page.missed, page.lines[0], page.next) == (5, "7", 7 + PAGE_LINES)
    assert log.page(-MAX_LINES * 2).missed == 0


def test_bytes_are_bounded_too() -> None:
    log = ProcessLog()
    for _ in range(5):
        log.add("x" * (MAX_BYTES // 2))
    assert len(log.page(-9).lines) == 2
