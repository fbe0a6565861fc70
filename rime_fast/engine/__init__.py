"""Engine: rollouts, gradient caching and synchronisation."""
