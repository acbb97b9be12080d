"""The reorder buffer: whatever order operations come in, they are taken in the order of
their numbers, each once, one at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astuner.errors import RequestError
from astuner.service.oplog import OperationLog


@given(st.permutations(range(1, 9)), st.data())
def test_any_order_of_arrival_is_done_in_the_order_of_numbers(
    arrival: list[int], data: st.DataObject
) -> None:
    log: OperationLog[int] = OperationLog()
    done: list[int] = []
    for seq in arrival:
        log.add(seq, seq, 0.0)
        if data.draw(st.booleans()):
            while (operation := log.take(0.0)) is not None:
                assert log.take(0.0) is None  # one at a time
                done.append(operation)
                log.finish(operation, 0.0)
    while (operation := log.take(0.0)) is not None:
        done.append(operation)
        log.finish(operation, 0.0)
    assert done == list(range(1, 9))
    assert (log.next_seq, log.waiting, log.in_hand) == (9, 0, None)


def test_the_chunks_of_the_sdk_come_last_first() -> None:
    log: OperationLog[str] = OperationLog(next_seq=5)
    for seq, name in ((6, "second"), (7, "third"), (5, "first")):
        log.add(seq, name, 0.0)
    assert log.take(0.0) == "first"


@pytest.mark.parametrize("seq", [-1, 0, 1, 2, 3, 5, 2**31])
def test_numbers_that_cannot_be_are_refused(seq: int) -> None:
    log: OperationLog[str] = OperationLog(next_seq=3)
    log.add(3, "now", 0.0)
    log.add(5, "later", 0.0)
    assert log.take(0.0) == "now"  # 3 is being done
    with pytest.raises(RequestError) as refused:
        log.add(seq, "again", 0.0)
    assert refused.value.status == 400


def test_too_many_waiting_are_told_to_come_again_but_the_next_one_is_let_in() -> None:
    log: OperationLog[str] = OperationLog(max_waiting=2)
    log.add(2, "b", 0.0)
    log.add(3, "c", 0.0)
    with pytest.raises(RequestError) as refused:
        log.add(4, "d", 0.0)
    assert refused.value.status == 429
    log.add(1, "a", 0.0)
    assert log.take(0.0) == "a"


def test_a_number_that_never_comes_is_given_up_with_all_that_wait_behind_it() -> None:
    log: OperationLog[str] = OperationLog()
    log.add(1, "a", 0.0)
    assert log.take(0.0) == "a"
    log.add(3, "c", 1.0)
    log.add(5, "e", 1.0)
    log.finish("a", 10.0)  # stuck from now on
    assert log.overdue(60.0, 60.0) == (2, [])
    assert log.overdue(71.0, 60.0) == (2, ["c", "e"])
    log.add(6, "f", 72.0)
    assert log.take(72.0) == "f"


def test_what_is_answered_twice_uses_one_number_up() -> None:
    log: OperationLog[str] = OperationLog()
    log.add(1, "a", 0.0)
    log.add(2, "b", 0.0)
    assert log.take(0.0) == "a"
    log.finish("a", 0.0)
    log.finish("a", 0.0)
    assert (log.next_seq, log.take(0.0), log.all) == (2, "b", ["b"])
