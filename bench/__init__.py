"""The machinery under the tasks: config, checkpoints, encoders, data, features, results, runner, CLI."""
