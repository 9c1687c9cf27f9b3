"""The audit log against RFC 6962, and against someone who edits the database."""

import hashlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import delete, select, update

from atoll.server import audit
from atoll.server.audit import AuditBroken
from atoll.server.schema import audit as table
from atoll.server.store import Store

Together = Callable[[int, Callable[[int], object]], None]

# The reference tree of Certificate Transparency (google/certificate-transparency,
# merkletree tests): eight leaves, and the root over the first n of them.
LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


@pytest.mark.parametrize("size", range(9))
def test_the_root_is_that_of_the_reference_tree(size: int) -> None:
    leaves = [audit.leaf_hash(leaf) for leaf in LEAVES[:size]]
    assert audit.root(leaves).hex() == ROOTS[size]


@given(st.integers(1, 70), st.data())
def test_a_proof_leads_from_its_leaf_to_the_root_and_from_no_other(
    size: int, data: st.DataObject
) -> None:
    leaves = [hashlib.sha256(bytes([number])).digest() for number in range(size)]
    index = data.draw(st.integers(0, size - 1))
    path = audit.proof(leaves, index)
    assert audit.root_of(leaves[index], index, size, path) == audit.root(leaves)
    assert audit.root_of(b"\0" * 32, index, size, path) != audit.root(leaves)


def fill(store: Store, count: int) -> None:
    with store.begin() as connection:
        for number in range(count):
            audit.record(connection, "ann", "device.revoke", f"watch-{number}", 1.5, reason="ß")


def test_entries_come_back_as_they_were_recorded(store: Store) -> None:
    fill(store, 3)
    with store.read() as connection:
        assert audit.entries(connection, start=2) == [
            {
                "index": 2,
                "at": 1.5,
                "actor": "ann",
                "action": "device.revoke",
                "subject": "watch-2",
                "facts": {"reason": "ß"},
            }
        ]
        assert [e["index"] for e in audit.entries(connection, newest_first=True)] == [2, 1, 0]
        size, root = audit.verify(connection)
        assert size == 3
        assert root == audit.root(list(connection.execute(select(table.c.leaf)).scalars()))


def test_the_index_has_no_gaps_whoever_writes_at_once(store: Store, together: Together) -> None:
    together(4, lambda _: [fill(store, 1) for _ in range(5)])
    with store.read() as connection:
        assert audit.verify(connection)[0] == 20


def test_concurrent_entries_are_contiguous_on_postgresql(postgres: str, together: Together) -> None:
    store = Store(postgres)
    store.migrate()
    together(4, lambda _: [fill(store, 1) for _ in range(5)])
    with store.read() as connection:
        assert audit.verify(connection)[0] == 20
    store.close()


def test_an_entry_goes_with_the_transaction_that_wrote_it(store: Store) -> None:
    def fail() -> None:
        with store.begin() as connection:
            audit.record(connection, "ann", "device.revoke", "watch-1", 1.0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with store.read() as connection:
        assert audit.verify(connection) == (0, hashlib.sha256().digest())


@pytest.mark.parametrize(
    "tampering",
    [
        update(table).where(table.c.index == 1).values(entry=b"{}"),
        update(table).where(table.c.index == 1).values(leaf=b"\0" * 32),
        delete(table).where(table.c.index == 1),
    ],
)
def test_tampering_shows(store: Store, tampering: object) -> None:
    fill(store, 3)
    with store.begin() as connection:
        connection.execute(tampering)  # type: ignore[call-overload]
    with store.read() as connection, pytest.raises(AuditBroken, match="entry 1"):
        audit.verify(connection)


def test_rewriting_history_changes_the_root(store: Store) -> None:
    fill(store, 3)
    with store.read() as connection:
        before = audit.verify(connection)[1]
    with store.begin() as connection:
        connection.execute(
            update(table).where(table.c.index == 1).values(entry=b"{}", leaf=audit.leaf_hash(b"{}"))
        )
    with store.read() as connection:
        assert audit.verify(connection)[1] != before
