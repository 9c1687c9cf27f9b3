"""How often a run was started with Flower, and taken up again in vain; of old ones, never."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    for name in ("attempt", "stalled"):
        op.add_column(
            "runs", sa.Column(name, sa.Integer(), nullable=False, server_default=sa.text("0"))
        )
