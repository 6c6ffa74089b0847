"""Run by Alembic, on the connection that `migrations.upgrade` passes."""

from alembic import context

from key_agent.registry.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # The transaction is the caller's.
    transactional_ddl=False,
)
context.run_migrations()
