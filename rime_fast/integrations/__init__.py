"""rime-fast's engine behind other libraries' interfaces; each module imports its library, nothing here does."""
