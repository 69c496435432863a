"""The hardware core: fixed-point model (NumPy), RTL generator (Amaranth), simulation. docs/hardware.md specifies it."""
