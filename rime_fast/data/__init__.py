"""Data: record schemas, prompt templates, collation into packed batches, validation."""
