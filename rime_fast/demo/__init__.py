"""The demo: a digit-chain retrieval task on real scans, trained and reported end to end."""
