"""The core in Amaranth (docs/hardware.md §10). Needs the extra ``hw``; nothing outside of hw imports it."""
