"""Run by Alembic, on the connection that `migrations.upgrade` passes."""

from alembic import context

from proxy.tenants.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=False,  # the transaction is the caller's
)
context.run_migrations()
