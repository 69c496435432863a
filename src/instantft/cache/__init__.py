"""The forward cache: how a record is written (codecs) and where it is kept (store)."""
