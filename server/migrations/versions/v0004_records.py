"""What rounds moved, who was in them, what a run tells of itself, how far it was exported."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_ROUND = (
    ("bytes_up", sa.BigInteger()),
    ("bytes_down", sa.BigInteger()),
    ("clip_norm", sa.Float()),
    ("drawn", sa.Integer()),
    ("connected", sa.Integer()),
    ("accuracy", sa.Float()),
    ("evaluated", sa.Integer()),
    ("evaluate_seconds", sa.Float()),
)


def upgrade() -> None:
    for name, kind in _ROUND:
        op.add_column("rounds", sa.Column(name, kind, nullable=True))
    op.add_column(
        "rounds", sa.Column("lost", sa.Boolean(), nullable=False, server_default=sa.false())
    )
    op.add_column("runs", sa.Column("record", sa.JSON(), nullable=True))
    op.create_table(
        "exports",
        sa.Column("run", sa.String(length=32), nullable=False),
        sa.Column("target", sa.String(length=255), nullable=False),
        sa.Column("mark", sa.String(length=64), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["run"], ["runs.id"]),
        sa.PrimaryKeyConstraint("run", "target"),
    )
