"""Evaluation: metrics, mutual retrieval, the embedding API, reports."""
