"""Rows as plain dicts, which is what the templates take."""

from typing import Any

from sqlalchemy import Connection, Executable

Row = dict[str, Any]


def rows(connection: Connection, query: Executable) -> list[Row]:
    """Return what ``query`` selects."""
    return [
        {str(name): value for name, value in row.items()}
        for row in connection.execute(query).mappings()
    ]


def first(connection: Connection, query: Executable) -> Row | None:
    """Return the first row of what ``query`` selects; none if it selects none."""
    row = connection.execute(query).mappings().first()
    return None if row is None else {str(name): value for name, value in row.items()}
