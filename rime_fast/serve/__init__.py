"""A trained model where people run models: export to other engines, parity checks, the embedding server."""
