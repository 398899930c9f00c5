"""Built-in suites: YAML files that name data sets and the protocol fields that differ."""
