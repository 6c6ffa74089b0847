"""Who uses a forward proxy: for which tenant, and by what proof."""
