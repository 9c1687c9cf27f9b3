"""Alembic's entry: runs the migrations over the connection that the store hands in.

A new migration is drafted, against a migrated database, with
``alembic.command.revision(store.migration_config(connection), "what", autogenerate=True)``.
"""

from alembic import context

from atoll.server.schema import metadata

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    render_as_batch=True,  # SQLite alters tables by copying them
)
with context.begin_transaction():
    context.run_migrations()
