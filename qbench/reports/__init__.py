"""Reports: rows in, tables and statistics out. Nothing here imports torch, so a store can be read anywhere."""
