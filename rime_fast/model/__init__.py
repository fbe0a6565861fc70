"""Models: dual-mode read-outs around transformers' Qwen-VL families, packing, tokens."""
