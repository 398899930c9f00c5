"""Pure functions on arrays that the tasks share: no device choice, path, logger or global state."""
