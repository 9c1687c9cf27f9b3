"""The hub: API, dashboard, ingest, coordinator, storage, governance, supervised parts."""
