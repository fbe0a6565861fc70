"""Trainers: transformers.Trainer subclasses for joint training and Refine-RL."""
