"""The recipe: losses, rewards and policy objectives as pure functions of tensors."""
