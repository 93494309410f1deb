"""The machine, its processes, the services and toolchains on it."""
