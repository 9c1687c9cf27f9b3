"""The noise that windows carry; those stored before carry none."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column(
        "windows", sa.Column("noise", sa.Float(), nullable=False, server_default=sa.text("0"))
    )
