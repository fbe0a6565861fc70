"""The operators: pure functions of tensors, with reference, chunked and compiled implementations (docs/api.md)."""
