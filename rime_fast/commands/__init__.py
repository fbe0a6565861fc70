"""The commands behind ``rime-fast``: options.py reads and checks them, one module a command runs them."""
